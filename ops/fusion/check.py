# SPDX-License-Identifier: Apache-2.0
"""What arguments the state fusion takes."""

from torch import Tensor

from .._check import check_shapes, check_tensors


def check_arguments(h: Tensor, weight: Tensor) -> None:
    """Raise a ValueError that names the first argument that does not fit, what was needed and what came."""
    tensors = dict(h=h, weight=weight)
    check_tensors('state_fusion', tensors)
    if h.dim() != 4 or h.numel() == 0:
        raise ValueError(f'state_fusion: h must be (batch, H, W, E) and not empty, got {tuple(h.shape)}.')
    check_shapes('state_fusion', tensors, dict(weight=('(3, E, 3, 3)', (3, h.shape[3], 3, 3))))
