# SPDX-License-Identifier: Apache-2.0
"""Inputs of the ops as the models make them, and the steps of an op."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Height (and width) of the map and channels E in the four stages, at 224x224.
VMAMBA_STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))
# Maps whose scans have many states: vanilla VMamba's third stage, Vim's tokens at both strides, MambaVision's windows.
TOKEN_MAPS = ((14, 14), (1, 197), (1, 730), (1, 49), (1, 196))
TOKEN_STATES = (1, 8, 16)
SPATIAL_MAMBA_STAGES = ((56, 128), (28, 256), (14, 512), (7, 1024))


def scan_inputs(
    batch: int,
    size: int | tuple[int, int],
    dim: int,
    N: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = 'cpu',
    K: int = 4,
) -> dict[str, Tensor]:
    """Inputs of the scan in K orders on a map of `size` x `size`, or of a height and a width: dt, B and C are slices of
    one projection, and parameters are in float32."""
    height, width = (size, size) if isinstance(size, int) else size
    R = -(-dim // 16)
    proj = torch.randn(batch, height, width, K, R + 2 * N, dtype=dtype, device=device) * 0.5
    dt, B, C = proj.split([R, N, N], dim=-1)
    return dict(
        x=torch.randn(batch, height, width, dim, dtype=dtype, device=device),
        dt=dt,
        A=-torch.arange(1.0, N + 1, device=device).expand(K, dim, N).contiguous(),
        B=B,
        C=C,
        D=torch.ones(K, dim, device=device),
        dt_bias=torch.empty(K, dim, device=device).uniform_(-6.9, -2.3),
        dt_weight=torch.empty(K, dim, R, device=device).uniform_(-(R**-0.5), R**-0.5),
    )


def forward(op: Callable[..., Tensor], tensors: Mapping[str, Tensor], **options: Any) -> None:
    with torch.inference_mode():
        op(**tensors, **options)


def step(op: Callable[..., Tensor], tensors: Mapping[str, Tensor], grad: Tensor, **options: Any) -> None:
    """Forward and backward, from the gradient of the output."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    op(**leaves, **options).backward(grad)


def ratios(row: Mapping[str, Any], kernel: str, others: Sequence[str]) -> list[str]:
    """Cells for the forward pass and for a step: the kernel's milliseconds, and how many times as long others took.

    Args:
        row: Figures of a shape, with the milliseconds of every call.
        kernel: Name of the call that the others are held against.
        others: Names of the other calls.
    """
    cells = []
    for what in ('forward', 'step'):
        ms = row[f'{what}_{kernel}_ms']
        cells += [f'{ms:.2f}', *(f'{row[f"{what}_{other}_ms"] / ms:.1f}' for other in others)]
    return cells
