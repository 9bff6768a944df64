# SPDX-License-Identifier: Apache-2.0
"""MambaMIL and SRMambaMIL: a slide as one long sequence, walked once, or a second time in another order.

Paper: `MambaMIL: Enhancing Long Sequence Modeling with Sequence Reordering in Computational Pathology` (MICCAI 2024) -
https://arxiv.org/abs/2403.06800

Written from the paper. What it leaves open is chosen as follows: two blocks, 16 states, a rate of 10; where the rate
does not divide the number of patches, zeros are added at the end for the second walk, and what comes out there is
dropped; what the two walks give is summed before the gate.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ssm
from .networks import MIL

__all__ = ['SRMambaMIL']


class Walk(nn.Module):
    """A causal depthwise convolution and a selective scan along a sequence, in its order or in that of a stride.

    With a rate r the walk visits every r-th token from the first one on, then every r-th from the second one on, and so
    forth: the columns of a map with r tokens a row.
    """

    def __init__(self, dim: int, dt_rank: int, d_state: int, rate: int | None, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dt_rank = dt_rank
        self.d_state = d_state
        self.rate = rate
        self.conv = nn.Conv1d(dim, dim, kernel_size=4, padding=3, groups=dim, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(dim, dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(1, dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(1, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(1, dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(1, dim, **dd))
        ssm.init_scan_(self.A_log, self.D, self.dt_weight, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        if self.rate is not None:
            x = F.pad(x, (0, 0, 0, -n % self.rate)).unflatten(0, (-1, self.rate)).transpose(0, 1).flatten(0, 1)
        length = len(x)  # n, and the zeros
        x = self.conv(x.t()[None])[..., :length].transpose(1, 2).contiguous()  # [length, E] -> [1, length, E]
        x = self.act(x)[None]  # -> [1, 1, length, E], a map of one row
        proj = self.x_proj(x).unsqueeze(3)  # -> [1, 1, length, K = 1, R + 2N]
        dt, B, C = proj.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = ssm.decay_rates(self.A_log)
        y = ssm.scan(x, dt, A, B, C, self.D, self.dt_bias, self.dt_weight, ndim=1, orders=[0])[0, 0]
        if self.rate is not None:
            y = y.unflatten(0, (self.rate, -1)).transpose(0, 1).flatten(0, 1)[:n]
        return y  # [n, E]


class SRMamba(nn.Module):
    """Mamba's mixer with a walk for each of several orders; the projections and the gate are shared."""

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        rates: tuple[int | None, ...] = (None,),
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim = int(dim * ssm_ratio)
        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.walks = nn.ModuleList([Walk(inner_dim, math.ceil(dim / 16), d_state, rate, **dd) for rate in rates])
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [n, C] -> 2 x [n, E]
        y = sum(walk(x) for walk in self.walks)
        return self.out_proj(y * F.silu(z))  # -> [n, C]


class Block(nn.Module):
    def __init__(self, dim: int, device=None, dtype=None, **mixer_args) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = SRMamba(dim, **mixer_args, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class SRMambaMIL(MIL):
    """SRMambaMIL, and without its second walk MambaMIL: linear, ReLU, Mamba blocks, norm, gated attention, linear.

    The sequence is that of the file; each slide of a case has its own, and all are pooled together.

    Args:
        in_dim: Width of the features.
        num_classes: Number of classes or time bins, or 1 for a risk.
        dim: Width of the tokens.
        depth: Number of blocks.
        rate: Stride of the second walk; None for a network without it, MambaMIL.
        d_state: Number of states per channel, N.
        ssm_ratio: Inner width of the mixer over dim.
        pool: 'attention', 'gated' for attention with a gate, 'mean' or 'max'.
        drop_rate: Dropout of the embedded features.
    """

    def __init__(
        self,
        in_dim: int = 1024,
        num_classes: int = 2,
        dim: int = 512,
        depth: int = 2,
        rate: int | None = 10,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        pool: str = 'gated',
        drop_rate: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_dim, num_classes, dim, pool, drop_rate, **dd)
        if rate is not None and rate < 2:
            raise ValueError(f'SRMambaMIL: rate must be 2 or more, or None, got {rate!r}.')
        self.act = nn.ReLU()
        rates = (None,) if rate is None else (None, rate)
        block_args = dict(d_state=d_state, ssm_ratio=ssm_ratio, rates=rates)
        self.blocks = nn.ModuleList([Block(dim, **block_args, **dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {f'blocks.*.mixer.walks.*.{name}' for name in ('A_log', 'D', 'dt_bias')}

    def forward_features(
        self, features: Tensor, coords: Tensor | None = None, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        x, patches = super().forward_features(features)  # [n, in_dim] -> [n, C]
        for block in self.blocks:
            x = block(x)
        return self.norm(x), patches
