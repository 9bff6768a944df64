# SPDX-License-Identifier: Apache-2.0
"""Stands in for mmcv's compiled extension, `mmcv._ext`, with the operators of torchvision.

mmdet and mmseg import all of mmcv's operators, and of the compiled ones our models use NMS and RoIAlign, which
torchvision brings along. So `mmcv-lite` is enough, where a compiled mmcv, of which recent PyTorch has no wheels, takes
half an hour. A compiled extension always wins: Python asks the stand-in last.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision.ops
from torch import Tensor

__all__ = ['install', 'nms', 'roi_align_backward', 'roi_align_forward']

NAME = 'mmcv._ext'


def install() -> None:
    """Let `import mmcv._ext` find the stand-in wherever nothing else is found; a second call does nothing."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)


class _Finder:
    """Finder and loader in one, as `sys.meta_path` takes them."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        return ModuleSpec(name, cls, origin=__file__)  # type: ignore[arg-type]  # a class can be a loader

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None  # so that Python makes a plain module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        from mmengine.logging import print_log  # mmcv needs mmengine itself

        operators = (nms, roi_align_forward, roi_align_backward)
        vars(module).update({operator.__name__: operator for operator in operators}, __getattr__=_missing)
        print_log("mmcv has no compiled operators: torchvision's nms and roi_align stand in for them.", 'current')


def _missing(name: str) -> Callable[..., Any]:
    """mmcv takes every operator by name when it is imported; one that is not here says so when it is called."""
    if name.startswith('__'):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f'{NAME}.{name} needs the compiled mmcv, got the stand-in, which has nms and roi_align alone: '
            '`pip uninstall mmcv-lite`, then `pip install --no-build-isolation "mmcv>=2.1,<2.2"`, which compiles it.'
        )

    return refuse


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that non-maximum suppression keeps, best first, (kept,).

    Args:
        bboxes: x1, y1, x2, y2 of each box, (boxes, 4).
        scores: Scores of the boxes, (boxes,).
        iou_threshold: Largest overlap with a better box at which a box is kept.
        offset: Number that is added to x2 - x1 and y2 - y1 for the sides of a box, 0 or 1.
    """
    return torchvision.ops.nms(bboxes + bboxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average of bilinear samples in each cell of each region, written to `output`; half precision counts in float32.

    Args:
        input: Map, (batch, C, H, W).
        rois: Index of the image, then x1, y1, x2, y2, of each region, (regions, 5).
        output: Tensor to write the averages to, (regions, C, aligned_height, aligned_width).
        argmax_y, argmax_x: Positions of the maximum, which are not used.
        aligned_height, aligned_width: Numbers of cells of a region along its height and width.
        spatial_scale: The map's resolution over that of `rois`.
        sampling_ratio: Number of samples of a cell along each axis, 0 for as many as the map's positions in it.
        pool_mode: Kind of pooling; 1 is the average.
        aligned: Whether a position is the middle of its cell rather than the corner.

    Raises:
        NotImplementedError: pool_mode is 0, the maximum.
    """
    if pool_mode != 1:
        _missing('roi_align_forward with pool_mode="max"')()
    size = (aligned_height, aligned_width)
    boxes, scale = rois.to(_at_least_float32(input)), spatial_scale
    values = torchvision.ops.roi_align(input.to(boxes.dtype), boxes, size, scale, sampling_ratio, aligned)
    output.copy_(values)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of the map of `roi_align_forward`, which has the same arguments, written to `grad_input`."""
    dtype = _at_least_float32(grad_output)
    size = (aligned_height, aligned_width)
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype), rois.to(dtype), spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
    )
    grad_input.copy_(grad)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
