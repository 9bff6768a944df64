# SPDX-License-Identifier: Apache-2.0
"""The selective scan in plain PyTorch: the definition that every kernel is judged by.

Every step of the recurrence is one tensor operation over (batch, the other axis, channels, states), so a map takes
H + W steps in 2-D and H * W in 1-D. Autograd differentiates it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """The selective scan of `vssm.ops.selective_scan`, same arguments, as plain tensor operations.

    Computes in float64 if x is float64, else in float32. Arguments are not checked here.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out_dtype = x.dtype
    x, dt, A, B, C, D, dt_bias, dt_weight = (
        None if t is None else t.to(dtype) for t in (x, dt, A, B, C, D, dt_bias, dt_weight)
    )

    if dt_weight is not None:
        dt = torch.einsum('bhwkr,ker->bhwke', dt, dt_weight)
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt)

    y = torch.zeros_like(x) if D is None else x * D.sum(0)
    for k, order in enumerate(orders):
        step = dt[:, :, :, k, :, None]  # [batch, H, W, E, 1]
        a = torch.exp(step * A[k])  # [batch, H, W, E, N]
        b = step * x.unsqueeze(-1) * B[:, :, :, k, None]  # [batch, H, W, E, N]
        h = _from_walk(_scan(_to_walk(a, order), _to_walk(b, order), ndim), order)
        y = y + (h.squeeze(-1) if C is None else (h * C[:, :, :, k, None]).sum(-1))
    return y.to(out_dtype)


def _to_walk(t: Tensor, order: int) -> Tensor:
    """Map -> walk: axes 1 and 2 become the outer and the inner axis of `order`."""
    if order in (1, 3):
        t = t.transpose(1, 2)
    return t.flip(1, 2) if order >= 2 else t


def _from_walk(t: Tensor, order: int) -> Tensor:
    if order >= 2:
        t = t.flip(1, 2)
    return t.transpose(1, 2) if order in (1, 3) else t


def _scan(a: Tensor, b: Tensor, ndim: int) -> Tensor:
    """The recurrence over axes 1 (outer) and 2 (inner) of (batch, outer, inner, E, N)."""
    if ndim == 1:
        walk = a.flatten(1, 2), b.flatten(1, 2)
        return _scan_axis(*walk, dim=1).unflatten(1, a.shape[1:3])
    g = _scan_axis(a, b, dim=2)
    return _scan_axis(a, g, dim=1)


def _scan_axis(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] along `dim`, h[-1] = 0."""
    h, states = torch.zeros_like(b.select(dim, 0)), []
    for a_t, b_t in zip(a.unbind(dim), b.unbind(dim), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim)
