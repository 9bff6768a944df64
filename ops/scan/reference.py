# SPDX-License-Identifier: Apache-2.0
"""The selective scan in plain PyTorch: the definition that every kernel is judged by.

Every step of the recurrence is one tensor operation over (batch, the other axis, channels, states), so a map takes
H + W steps in 2-D and H * W in 1-D. Autograd differentiates it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import compute_dtype


def scan(a: Tensor, b: Tensor, ndim: int) -> Tensor:
    """The recurrence over axes 1 (outer) and 2 (inner) of a walk, (batch, outer, inner, E, N): all its states."""
    if ndim == 1:
        return scan_axis(a.flatten(1, 2), b.flatten(1, 2), dim=1).unflatten(1, a.shape[1:3])
    g = scan_axis(a, b, dim=2)
    return scan_axis(a, g, dim=1)


def scan_axis(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] along `dim`, h[-1] = 0."""
    h, states = torch.zeros_like(b.select(dim, 0)), []
    for a_t, b_t in zip(a.unbind(dim), b.unbind(dim), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim)


def selective_scan_ref(
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
    recurrence: Callable[[Tensor, Tensor, int], Tensor] = scan,
) -> Tensor:
    """The selective scan of `vssm.ops.selective_scan`, same arguments, as plain tensor operations.

    Computes in float64 if x is float64, else in float32. Arguments are not checked here.

    Args:
        recurrence: Another way to compute the states of a walk from a, b and ndim, in place of `scan`.
    """
    dtype, out_dtype = compute_dtype(x), x.dtype
    x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    dt = step_sizes(dt, dt_bias, dt_weight, softplus, dtype)
    y = torch.zeros_like(x) if D is None else x * D.to(dtype).sum(0)
    for k, order in enumerate(orders):
        step = dt[:, :, :, k, :, None]  # [batch, H, W, E, 1]
        a = torch.exp(step * A[k])  # [batch, H, W, E, N]
        b = step * x.unsqueeze(-1) * B[:, :, :, k, None]  # [batch, H, W, E, N]
        h = from_walk(recurrence(to_walk(a, order), to_walk(b, order), ndim), order)
        y = y + (h.squeeze(-1) if C is None else (h * C.to(dtype)[:, :, :, k, None]).sum(-1))
    return y.to(out_dtype)


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_weight: Tensor | None, softplus: bool, dtype: torch.dtype
) -> Tensor:
    """The step sizes of every position, order and channel, (batch, H, W, K, E)."""
    dt = dt.to(dtype)
    if dt_weight is not None:
        dt = torch.einsum('bhwkr,ker->bhwke', dt, dt_weight.to(dtype))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def to_walk(t: Tensor, order: int) -> Tensor:
    """Map to walk: axes 1 and 2 become the outer and the inner axis of `order`."""
    if order in (1, 3):
        t = t.transpose(1, 2)
    return t.flip(1, 2) if order >= 2 else t


def from_walk(t: Tensor, order: int) -> Tensor:
    """Walk to map: the inverse of `to_walk`."""
    if order >= 2:
        t = t.flip(1, 2)
    return t.transpose(1, 2) if order in (1, 3) else t
