# SPDX-License-Identifier: Apache-2.0
"""The operators as tensor operations and loops, for exporters that know no operators of ours.

The reference writes every step of the recurrence into the graph, which fixes the sizes of the map. Here a pass along an
axis is one loop, torch's higher-order `scan`: the graph is the same for every size, and ONNX has a node for it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from . import backend  # noqa: F401, which loads the operators
from .fusion.reference import state_fusion_ref
from .scan.reference import _from_walk, _to_walk


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
    a = torch.exp(dt.unsqueeze(-1) * A)  # [B, H, W, K, E, N]
    b = (dt * x.unsqueeze(3)).unsqueeze(-1) * B.unsqueeze(-2)  # [B, H, W, K, E, N]
    states = {}
    for axis in (0, 1):  # the orders along the rows, which take one loop, then those along the columns
        walks = [(k, order) for k, order in enumerate(orders) if order % 2 == axis]
        if walks:
            maps = (torch.stack([_to_walk(t.select(3, k), order) for k, order in walks], dim=3) for t in (a, b))
            for (k, order), h in zip(walks, _scan(*maps, ndim).unbind(3), strict=True):
                states[k] = _from_walk(h, order)
    h = torch.stack([states[k] for k in range(len(orders))], dim=3)  # [B, H, W, K, E, N]
    y = (h if C is None else h * C.unsqueeze(-2)).sum((3, -1))
    if D is not None:
        y = y + x * D.sum(0)
    return y.to(out_dtype)


def _scan(a: Tensor, b: Tensor, ndim: int) -> Tensor:
    """The recurrence over axes 1 (outer) and 2 (inner) of (batch, outer, inner, ...)."""
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


# For `ExportedProgram.run_decompositions`: the operators of the zoo and what stands for them.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable] = {
    torch.ops.vssm.selective_scan.default: selective_scan_decomp,
    torch.ops.vssm.state_fusion.default: state_fusion_ref,
}
