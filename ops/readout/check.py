# SPDX-License-Identifier: Apache-2.0
"""What arguments the gated readout takes."""

from torch import Tensor

from .._check import check_shapes, check_tensors


def check_arguments(h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise a ValueError that names the first argument that does not fit, what was needed and what came."""
    tensors = dict(h=h, x=x, C=C, D=D, z=z, weight=weight, bias=bias)
    check_tensors('gated_readout', tensors)
    if h.dim() == 0 or h.numel() == 0:
        raise ValueError(f'gated_readout: h must be (..., E) and not empty, got {tuple(h.shape)}.')
    shape = tuple(h.shape)
    per_element, per_position, per_channel = ('(..., E)', shape), ('(..., 1)', (*shape[:-1], 1)), ('(E,)', shape[-1:])
    expected = dict(x=per_element, C=per_position, D=per_channel, z=per_element, weight=per_channel, bias=per_channel)
    check_shapes('gated_readout', tensors, expected)
