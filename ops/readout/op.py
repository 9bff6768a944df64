# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's gated readout, what follows the state fusion in its mixer, in one pass on a CPU.

The schema and the kernels are in `csrc/`. There are none for other devices: the mixer calls this in eager mode on a CPU
and takes the plain operations otherwise, which compilers fuse by themselves.
"""

from typing import Any

import torch
from torch import Tensor


def gated_readout(
    h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """layer_norm(C h + D x) * silu(z), channels last, on a CPU.

    Source: Xiao et al., "Spatial-Mamba" (arXiv:2410.15091), the output equation on the fused states, and the gate.

    Args:
        h: Fused states, (..., E).
        x: What the scan took in, (..., E).
        C: Output coefficients, (..., 1).
        D: Skip coefficients, (E,).
        z: The gate's input, (..., E).
        weight: Of the norm, (E,).
        bias: Of the norm, (E,).
        eps: Of the norm.

    Returns:
        The gated map, (..., E), contiguous.

    Raises:
        RuntimeError: A shape does not fit, or not all are on the CPU in one type, float32 or float64.
    """
    return torch.ops.vssm.gated_readout(h, x, C, D, z, weight, bias, eps)


@torch.library.register_fake('vssm::gated_readout')
def _fake(h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.register_fake('vssm::gated_readout_backward')
def _fake_backward(grad_y: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:7])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor) -> tuple:
    return *torch.ops.vssm.gated_readout_backward(grad_y, *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd('vssm::gated_readout', _backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        'gated_readout: the kernels have no second derivative; use `with vssm.ops.use_reference():`.'
    )


torch.library.register_autograd('vssm::gated_readout_backward', _no_double_backward)
