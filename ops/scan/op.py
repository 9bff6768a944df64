# SPDX-License-Identifier: Apache-2.0
"""The selective scan, the one op of the zoo: public function, argument checks, fake, autograd, autocast, FLOP formulas.

The schema and the CPU kernels are in `csrc/`, the CUDA kernels in `triton/`, the definition is `reference.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._register import is_transformed, make_function, register_vmap
from ..backend import check_device, load_triton, uses_reference
from .reference import selective_scan_ref


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    ndim: int = 2,
    orders: Sequence[int] = (0, 1, 2, 3),
    softplus: bool = True,
) -> Tensor:
    """Scan a feature map along up to four walks and sum what they give, in the map's own layout.

    With dt = softplus(raw_dt + dt_bias), a = exp(dt A) and b = dt B x at every position, order, channel and state,
    i the outer and j the inner axis of a walk:

        1-D (Mamba):     h[t] = a[t] h[t-1] + b[t]  over the flattened walk
        2-D (2DMamba):   g[i,j] = a[i,j] g[i,j-1] + b[i,j],  then  h[i,j] = a[i,j] h[i-1,j] + g[i,j]
        y = sum over orders of (sum over states of C h) + D x

    Order 0 walks along the rows, 1 along the columns, 2 and 3 are those reversed. The recurrence is computed in
    float32, in float64 if x is float64. Source: Gu & Dao, "Mamba" (arXiv:2312.00752), section 3; Zhang et al.,
    "2DMamba" (arXiv:2412.00678), section 3.

    Args:
        x: Feature map, channels last, any strides (contiguous is fast), (batch, H, W, E).
        dt: Step sizes before bias and softplus, (batch, H, W, K, E); with `dt_weight` their low-rank form,
            (batch, H, W, K, R).
        A: Decay rates, negative, (K, E, N). Never rounded to half precision.
        B: Input map, (batch, H, W, K, N).
        C: Output map, (batch, H, W, K, N). Without it K = N = 1, D is None and y is the state.
        D: Skip connection, (K, E).
        dt_bias: Bias of the step sizes, (K, E).
        dt_weight: Expands low-rank step sizes inside the kernel, raw_dt = dt_weight @ dt, (K, E, R).
        ndim: Which recurrence, 1 or 2.
        orders: Which walks, K = 1, 2 or 4 different ones of 0, 1, 2, 3.
        softplus: Whether the step sizes pass through softplus.

    Returns:
        y, (batch, H, W, E), contiguous, in x's dtype.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, or the options do not go together.
        NotImplementedError: x is on a device that has no kernel.
    """
    if not torch.jit.is_tracing():  # where sizes are tensors
        _check(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders)
    if uses_reference(x):
        return _run_reference(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)
    check_device('selective_scan', x)
    if is_transformed():
        if _autocast_is_on(x):  # here, where the transforms see it
            x, dt, B, C = _autocast_inputs(x, dt, B, C)
        return _Scan.apply(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)
    return torch.ops.vssm.selective_scan(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    ndim: int,
    orders: Sequence[int],
) -> None:
    """Raise a ValueError that names the first argument that does not fit, what was needed and what came."""
    tensors = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, dt_weight=dt_weight)
    for name, t in tensors.items():
        if t is None and name in ('C', 'D', 'dt_bias', 'dt_weight'):
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f'selective_scan: {name} must be a tensor, got {type(t).__name__}.')
        if not t.is_floating_point():
            raise ValueError(f'selective_scan: {name} must have a floating dtype, got {t.dtype}.')
        if t.device != x.device:
            raise ValueError(f'selective_scan: {name} must be on the device of x, {x.device}, got {t.device}.')

    if ndim not in (1, 2):
        raise ValueError(f'selective_scan: ndim must be 1 or 2, got {ndim!r}.')
    is_orders = isinstance(orders, (list, tuple)) and all(isinstance(order, int) for order in orders)
    if not is_orders or len(orders) not in (1, 2, 4) or len(set(orders) & {0, 1, 2, 3}) != len(orders):
        raise ValueError(f'selective_scan: orders must be 1, 2 or 4 different ones of 0, 1, 2, 3, got {orders!r}.')
    num_orders = len(orders)

    if x.dim() != 4:
        raise ValueError(f'selective_scan: x must be (batch, H, W, E), got {tuple(x.shape)}.')
    if A.dim() != 3:
        raise ValueError(f'selective_scan: A must be (K, E, N), got {tuple(A.shape)}.')
    if dt_weight is not None and dt_weight.dim() != 3:
        raise ValueError(f'selective_scan: dt_weight must be (K, E, R), got {tuple(dt_weight.shape)}.')
    batch, height, width, channels = x.shape
    states = A.shape[2]
    rank = channels if dt_weight is None else dt_weight.shape[2]
    per_channel = (num_orders, channels)
    per_position = (batch, height, width, num_orders)
    expected = dict(
        A=('(K, E, N)', (*per_channel, states)),
        dt_weight=('(K, E, R)', (*per_channel, rank)),
        dt=('(batch, H, W, K, E)' if dt_weight is None else '(batch, H, W, K, R)', (*per_position, rank)),
        B=('(batch, H, W, K, N)', (*per_position, states)),
        C=('(batch, H, W, K, N)', (*per_position, states)),
        D=('(K, E)', per_channel),
        dt_bias=('(K, E)', per_channel),
    )
    for name, (axes, shape) in expected.items():
        t = tensors[name]
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(
                f'selective_scan: {name} must be {axes} = {shape} for x of shape {tuple(x.shape)} and '
                f'{num_orders} orders, got {tuple(t.shape)}.'
            )
    for name, t in tensors.items():
        if t is not None and t.numel() == 0:
            raise ValueError(f'selective_scan: {name} must not be empty, got {tuple(t.shape)}.')
    if C is None and (num_orders > 1 or states > 1 or D is not None):
        raise ValueError(
            'selective_scan: without C, which makes y the state itself, one order, one state and no D are needed, got '
            f'K = {num_orders}, N = {states}, D {"absent" if D is None else "given"}.'
        )


@torch.library.register_fake('vssm::selective_scan')
def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake('vssm::selective_scan_backward')
def _fake_backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:8])


def _cuda(*args: Any) -> Tensor:
    return load_triton('selective_scan', 'scan.triton.launch').selective_scan_triton(*args)


def _cuda_backward(*args: Any) -> tuple[Tensor, ...]:
    return load_triton('selective_scan', 'scan.triton.launch').selective_scan_triton_backward(*args)


torch.library.impl('vssm::selective_scan', 'CUDA', func=_cuda)
torch.library.impl('vssm::selective_scan_backward', 'CUDA', func=_cuda_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.ndim, ctx.orders, ctx.softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    backward = _ScanBackward.apply if is_transformed() else torch.ops.vssm.selective_scan_backward
    grads = backward(grad_y, *tensors, ctx.ndim, ctx.orders, ctx.softplus)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None, None


torch.library.register_autograd('vssm::selective_scan', _backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        'selective_scan: the kernels have no second derivative; use `with vssm.ops.use_reference():`.'
    )


torch.library.register_autograd('vssm::selective_scan_backward', _no_double_backward)


_op = torch.ops.vssm.selective_scan.default
_op_backward = torch.ops.vssm.selective_scan_backward.default
_Scan = make_function(_op, _setup_context, _backward)
_ScanBackward = make_function(_op_backward, lambda ctx, inputs, output: None, _no_double_backward)
register_vmap(_op, maps=(0, 1, 3, 4))  # x, dt, B and C
register_vmap(_op_backward)  # whose gradients of the parameters are sums over the batch


def _autocast_is_on(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _run_reference(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus) -> Tensor:
    """The reference, under autocast with the same inputs cast as for a kernel, and computing as precisely."""
    options = dict(dt_weight=dt_weight, ndim=ndim, orders=orders, softplus=softplus)
    if not _autocast_is_on(x):
        return selective_scan_ref(x, dt, A, B, C, D, dt_bias, **options)
    x, dt, B, C = _autocast_inputs(x, dt, B, C)
    with torch.autocast(x.device.type, enabled=False):
        return selective_scan_ref(x, dt, A, B, C, D, dt_bias, **options)


def _register_autocast(key: str) -> None:
    """Under autocast, cast x, dt, B and C alone: A, D, dt_bias and dt_weight keep their precision."""
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus):
        x, dt, B, C = _autocast_inputs(x, dt, B, C)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.vssm.selective_scan(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)

    torch.library.impl('vssm::selective_scan', key, func=autocast)


_register_autocast('AutocastCPU')
_register_autocast('AutocastCUDA')


def selective_scan_macs(x_shape: list[int], K: int, N: int, R: int, ndim: int, has_C: bool, has_D: bool) -> int:
    """Multiply-accumulates of one forward pass, as the papers count them.

    Per position, order and channel: 9 N for a 1-D and 15 N for a 2-D scan, less 2 N without C, plus 1 for D, plus R
    for the low-rank step (R = 0 without it).
    """
    per_channel = (9 if ndim == 1 else 15) * N - (0 if has_C else 2 * N) + int(has_D) + R
    batch, height, width, channels = x_shape
    return batch * height * width * K * channels * per_channel


def _flops(x, dt, A, B, C, D, dt_bias, dt_weight, ndim) -> int:
    """FLOPs from the shapes, two a multiply-accumulate as torch's counter has it."""
    K, _, N = A
    return 2 * selective_scan_macs(
        x, K, N, 0 if dt_weight is None else dt_weight[2], ndim, C is not None, D is not None
    )


@register_flop_formula(torch.ops.vssm.selective_scan)
def _flop_formula(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, *args, **kwargs) -> int:
    return _flops(x, dt, A, B, C, D, dt_bias, dt_weight, ndim)


@register_flop_formula(torch.ops.vssm.selective_scan_backward)
def _flop_formula_backward(grad_y, x, dt, A, B, C, D, dt_bias, dt_weight, ndim, *args, **kwargs) -> int:
    """Twice the forward, torch's convention for a matrix product; what a kernel recomputes is not counted."""
    return 2 * _flops(x, dt, A, B, C, D, dt_bias, dt_weight, ndim)


def selective_scan_fvcore_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-accumulates for fvcore: `FlopCountAnalysis(...).set_op_handle('vssm::selective_scan', this)`.

    Args:
        inputs: The op's arguments as values of a traced graph (`torch._C.Value`).
        outputs: Unused.
    """
    x, _, A, _, C, D, _, dt_weight = (v.type().sizes() if v.isCompleteTensor() else None for v in inputs[:8])
    return selective_scan_macs(
        x, A[0], A[2], 0 if dt_weight is None else dt_weight[2], inputs[8].toIValue(), C is not None, D is not None
    )
