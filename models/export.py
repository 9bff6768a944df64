# SPDX-License-Identifier: Apache-2.0
"""Networks as ONNX files of standard operators."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decompositions import DECOMPOSITIONS
from .files import replacing, state_of

__all__ = ['export_onnx']


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | os.PathLike, images: Tensor | None = None) -> None:
    """Write `model` as one ONNX file that takes any batch, and any size of image that the model takes.

    Of a network of windows, MambaVision, the file holds for sides that more than one window covers, and that are whole
    windows, or not, as those of `images` are.

    A scan becomes ONNX `Scan` nodes, which go along a walk one step after the other: standard, but not fast.

    Args:
        model: A network of the zoo, in eval mode.
        path: The file to write; a file of that name is replaced as a whole.
        images: Two or more images that are not square, to trace with, (batch, in_chans, H, W), zeros of 64x96 unless
            given, or of the only size that the model takes. They are the file's input `images`.

    Raises:
        ImportError: The packages that write ONNX are not installed.
        FileNotFoundError: The folder of the file does not exist.
        ValueError: The model is in training mode, or images have another form.
    """
    missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'export_onnx: {" and ".join(missing)} not installed: run `pip install ".[export]"` in a clone of vssm.'
        )
    if model.training:
        raise ValueError('export_onnx: model must be in eval mode, call model.eval() first.')
    patch_embed: Any = getattr(model, 'patch_embed', None)
    only_size = patch_embed.img_size if getattr(patch_embed, 'strict_img_size', False) else None
    if images is None:
        weight, in_chans = next(model.parameters()), int(model.in_chans)  # type: ignore[arg-type]  # of any nn.Module
        images = torch.zeros(2, in_chans, *(only_size or (64, 96)), device=weight.device, dtype=weight.dtype)

    if images.dim() != 4 or images.shape[0] < 2 or not only_size and images.shape[2] == images.shape[3]:
        # PyTorch could not tell the file's axes from a batch of one, or from equal sides
        raise ValueError(
            'export_onnx: images must be two or more that are not square, (batch, in_chans, H, W), got '
            f'{tuple(images.shape)}.'
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'export_onnx: the folder of path {path} {state_of(path.parent)}.')

    axes = {0: 'batch'} if only_size else {0: 'batch', 2: 'height', 3: 'width'}
    dynamic_shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic_shapes).run_decompositions(DECOMPOSITIONS)
    onnx_program = torch.onnx.export(program, input_names=['images'], dynamic_shapes=(axes,), verbose=False)
    assert onnx_program is not None  # which it is where torch.onnx.export is told a file to write
    with replacing(path) as temporary:
        onnx_program.save(temporary, external_data=False)
