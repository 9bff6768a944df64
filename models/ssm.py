# SPDX-License-Identifier: Apache-2.0
"""What the state-space mixers share: the way to the operators, the decay rates, and the initialisation of a scan.

A function here that FX could not follow, as it looks at a shape or a dtype, is one node of any tracer's graph. For that
it is called as `ssm.scan`: a tracer finds a wrapped function in the module that defines it, not under imported names.
"""

import math

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..ops import selective_scan, state_fusion

for op in (selective_scan, state_fusion):  # where timm's tracer meets them in modules of others
    register_notrace_function(op)


@torch.fx.wrap
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor,
    dt_weight: Tensor,
    ndim: int,
    orders: list[int],
) -> Tensor:
    """`vssm.ops.selective_scan` with low-rank step sizes. TorchScript calls the operator without the checks."""
    if torch.jit.is_scripting():
        return torch.ops.vssm.selective_scan(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus=True)
    return selective_scan(x, dt, A, B, C, D, dt_bias, dt_weight=dt_weight, ndim=ndim, orders=orders)


@torch.fx.wrap
def fuse_states(h: Tensor, weight: Tensor) -> Tensor:
    """`vssm.ops.state_fusion`. TorchScript calls the operator without the checks."""
    if torch.jit.is_scripting():
        return torch.ops.vssm.state_fusion(h, weight)
    return state_fusion(h, weight)


@torch.fx.wrap
def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: rounding a rate to half precision would move every state."""
    if A_log.dtype != torch.float64:
        A_log = A_log.float()
    return -torch.exp(A_log)


@torch.no_grad()
def init_scan_(A_log: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Initialise the scan's own parameters in place, as Mamba does (arXiv:2312.00752, section 3.6).

    The decay rates become 1 to N, the skip 1, and the step weights uniform within R^-1/2; softplus of the step bias is
    log-uniform within [1e-3, 1e-1].

    Args:
        A_log: Logarithms of the decay rates, (..., E, N).
        D: Skip connection, (..., E).
        dt_weight: Low-rank expansion of the step sizes, (..., E, R).
        dt_bias: Bias of the step sizes, (..., E).
    """
    if (
        A_log.is_meta
    ):  # where there is nothing to fill, and the arithmetic would take most of the time to build a network
        return
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device).log().expand_as(A_log))
    nn.init.ones_(D)
    bound = dt_weight.shape[-1] ** -0.5
    nn.init.uniform_(dt_weight, -bound, bound)
    log_min, log_max = math.log(1e-3), math.log(1e-1)
    step = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(log_min, log_max).exp()
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
