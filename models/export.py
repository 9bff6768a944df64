# SPDX-License-Identifier: Apache-2.0
"""Networks as ONNX files of standard operators."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops.decompositions import DECOMPOSITIONS


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | os.PathLike, images: Tensor | None = None) -> None:
    """Write `model` as one ONNX file that takes any batch, and any size of image that the model takes.

    A scan becomes ONNX `Scan` nodes, which go along a walk one step after the other: standard, but not fast.

    Args:
        model: A network of the zoo, in eval mode.
        path: Where to write; a file there is replaced once all is written.
        images: What to trace with, two or more images that are not square, (batch, in_chans, H, W), the file's input
            `images`; by default zeros of 64x96.

    Raises:
        ImportError: The packages that write ONNX are not installed.
        FileNotFoundError: There is no folder for the file.
        ValueError: The model is in training mode, or images are not as said.
    """
    missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx: {' and '.join(missing)} not installed: `pip install '.[export]'` in a clone.")
    if model.training:
        raise ValueError('export_onnx: model must be in eval mode, call model.eval() first.')
    if images is None:
        weight = next(model.parameters())
        images = torch.zeros(2, model.in_chans, 64, 96, device=weight.device, dtype=weight.dtype)

    if images.dim() != 4 or images.shape[0] < 2 or images.shape[2] == images.shape[3]:
        # of a batch of one, or of equal sides, the file's axes could not be told
        raise ValueError(
            'export_onnx: images must be two or more that are not square, (batch, in_chans, H, W), got '
            f'{tuple(images.shape)}.'
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'export_onnx: the folder of path {path} does not exist.')

    axes = {0: 'batch', 2: 'height', 3: 'width'}
    dynamic_shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic_shapes).run_decompositions(DECOMPOSITIONS)
    onnx_program = torch.onnx.export(program, input_names=['images'], dynamic_shapes=(axes,), verbose=False)

    unfinished = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        onnx_program.save(unfinished, external_data=False)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
