# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's state fusion: public function, argument checks, fake, autograd, FLOP formulas.

The schema and the CPU kernels are in `csrc/`, the CUDA kernels in `triton.py`, the definition is `reference.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._register import is_transformed, make_function, register_vmap
from ..backend import check_device, load_triton, uses_reference
from .reference import state_fusion_ref


def state_fusion(h: Tensor, weight: Tensor) -> Tensor:
    """Sum a map over three dilated 3x3 neighbourhoods of every position, channel by channel.

    The dilations are 1, 3 and 5; beyond its border the map repeats itself. The kernels sum all three neighbourhoods
    at once, from the weights of each call, in training as in evaluation. Computed in float32, in
    float64 if h is float64. Source: Xiao et al., "Spatial-Mamba" (arXiv:2410.15091), structure-aware state fusion.

    Args:
        h: States, channels last, any strides (contiguous is fast), (batch, H, W, E).
        weight: One 3x3 kernel per dilation and channel, (3, E, 3, 3).

    Returns:
        The fused states, (batch, H, W, E), contiguous, in h's dtype.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device.
        NotImplementedError: h is on a device that has no kernel.
    """
    if not torch.jit.is_tracing():  # where sizes are tensors
        _check(h, weight)
    if uses_reference(h):
        with torch.autocast(h.device.type, enabled=False):  # it computes as precisely as a kernel
            return state_fusion_ref(h, weight)
    check_device('state_fusion', h)
    if is_transformed():
        return _Fusion.apply(h, weight)
    return torch.ops.vssm.state_fusion(h, weight)


def _check(h: Tensor, weight: Tensor) -> None:
    """Raise a ValueError that names the first argument that does not fit, what was needed and what came."""
    for name, t in dict(h=h, weight=weight).items():
        if not isinstance(t, Tensor):
            raise ValueError(f'state_fusion: {name} must be a tensor, got {type(t).__name__}.')
        if not t.is_floating_point():
            raise ValueError(f'state_fusion: {name} must have a floating dtype, got {t.dtype}.')
        if t.device != h.device:
            raise ValueError(f'state_fusion: {name} must be on the device of h, {h.device}, got {t.device}.')
    if h.dim() != 4 or h.numel() == 0:
        raise ValueError(f'state_fusion: h must be (batch, H, W, E) and not empty, got {tuple(h.shape)}.')
    expected = (3, h.shape[3], 3, 3)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f'state_fusion: weight must be (3, E, 3, 3) = {expected} for h of shape {tuple(h.shape)}, got '
            f'{tuple(weight.shape)}.'
        )


@torch.library.register_fake('vssm::state_fusion')
def _fake(h: Tensor, weight: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.register_fake('vssm::state_fusion_backward')
def _fake_backward(grad_y: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _cuda(h: Tensor, weight: Tensor) -> Tensor:
    return load_triton('state_fusion', 'fusion.triton').state_fusion_triton(h, weight)


def _cuda_backward(grad_y: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return load_triton('state_fusion', 'fusion.triton').state_fusion_triton_backward(grad_y, h, weight)


torch.library.impl('vssm::state_fusion', 'CUDA', func=_cuda)
torch.library.impl('vssm::state_fusion_backward', 'CUDA', func=_cuda_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    backward = _FusionBackward.apply if is_transformed() else torch.ops.vssm.state_fusion_backward
    return backward(grad_y, *ctx.saved_tensors)


torch.library.register_autograd('vssm::state_fusion', _backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        'state_fusion: the kernels have no second derivative; use `with vssm.ops.use_reference():`.'
    )


torch.library.register_autograd('vssm::state_fusion_backward', _no_double_backward)

_op = torch.ops.vssm.state_fusion.default
_op_backward = torch.ops.vssm.state_fusion_backward.default
_Fusion = make_function(_op, _setup_context, _backward)
_FusionBackward = make_function(_op_backward, lambda ctx, inputs, output: None, _no_double_backward)
register_vmap(_op, maps=(0,))
register_vmap(_op_backward)  # whose gradient of the weight is a sum over the batch


def state_fusion_macs(shape: list[int]) -> int:
    """Multiply-accumulates of one forward pass on (batch, H, W, E), as the paper counts them: three times nine taps."""
    batch, height, width, channels = shape
    return 27 * batch * height * width * channels


@register_flop_formula(torch.ops.vssm.state_fusion)
def _flop_formula(h, weight, *args, **kwargs) -> int:
    return 2 * state_fusion_macs(h)


@register_flop_formula(torch.ops.vssm.state_fusion_backward)
def _flop_formula_backward(grad_y, h, weight, *args, **kwargs) -> int:
    return 4 * state_fusion_macs(h)


def state_fusion_fvcore_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-accumulates for fvcore: `FlopCountAnalysis(...).set_op_handle('vssm::state_fusion', this)`.

    Args:
        inputs: The op's arguments as values of a traced graph (`torch._C.Value`).
        outputs: Unused.
    """
    return state_fusion_macs(inputs[0].type().sizes())
