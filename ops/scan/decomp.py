# SPDX-License-Identifier: Apache-2.0
"""The selective scan as tensor operations and loops, for exporters that know no operators of ours.

The reference writes every step of the recurrence into the graph, which fixes the sizes of the map. Here a pass along an
axis is one loop, torch's higher-order `scan`: the graph is the same for every size, and ONNX has a node for it.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from ..backend import compute_dtype
from .reference import from_walk, step_sizes, to_walk


def selective_scan_decomp(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    ndim: int,
    orders: list[int],
    softplus: bool,
) -> Tensor:
    """The operator `vssm::selective_scan`, same arguments; computes in float64 if x is float64, else in float32."""
    dtype, out_dtype = compute_dtype(x), x.dtype
    x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    dt = step_sizes(dt, dt_bias, dt_weight, softplus, dtype)
    a = torch.exp(dt.unsqueeze(-1) * A)  # [B, H, W, K, E, N]
    b = (dt * x.unsqueeze(3)).unsqueeze(-1) * B.unsqueeze(-2)  # [B, H, W, K, E, N]
    states = {}
    for axis in (0, 1):  # the orders along the rows, which take one loop, then those along the columns
        walks = [(k, order) for k, order in enumerate(orders) if order % 2 == axis]
        if walks:
            a_walk, b_walk = (
                torch.stack([to_walk(t.select(3, k), order) for k, order in walks], dim=3) for t in (a, b)
            )
            for (k, order), h in zip(walks, _scan(a_walk, b_walk, ndim).unbind(3), strict=True):
                states[k] = from_walk(h, order)
    h = torch.stack([states[k] for k in range(len(orders))], dim=3)  # [B, H, W, K, E, N]
    y = (h if C is None else h * C.to(dtype).unsqueeze(-2)).sum((3, -1))
    if D is not None:
        y = y + x * D.to(dtype).sum(0)
    return y.to(out_dtype)


def _scan(a: Tensor, b: Tensor, ndim: int) -> Tensor:
    """The recurrence over axes 1 (outer) and 2 (inner) of (batch, outer, inner, ...): all its states."""
    if ndim == 1:
        return _scan_axis(a.flatten(1, 2), b.flatten(1, 2), dim=1).unflatten(1, a.shape[1:3])
    return _scan_axis(a, _scan_axis(a, b, dim=2), dim=1)


def _scan_axis(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] along `dim`, h[-1] = 0, as one loop."""
    a, b = a.movedim(dim, 0), b.movedim(dim, 0)
    first = torch.zeros_like(b[0], memory_format=torch.contiguous_format)  # the carry must keep its strides
    return scan_op(_step, [first], [a, b], ())[1].movedim(0, dim)


def _step(h: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = a * h + b
    return h, h.clone()  # carry and output must not be one tensor
