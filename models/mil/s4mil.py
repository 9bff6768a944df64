# SPDX-License-Identifier: Apache-2.0
"""S4MIL: a slide as one long sequence, filtered by a linear state-space layer whose parameters are equal everywhere.

Papers:
* `Structured State Space Models for Multiple Instance Learning in Digital Pathology` (MICCAI 2023) -
  https://arxiv.org/abs/2306.15789
* `On the Parameterization and Initialization of Diagonal State Space Models` (NeurIPS 2022) -
  https://arxiv.org/abs/2206.11893

Written from the papers. What they leave open is chosen as follows: one layer of 32 complex states as 64 real ones, with
S4D-Lin's initialisation and zero-order hold; a layer norm before it and a residual around it, as S4D's own networks
have; GELU after the first linear layer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import MIL

__all__ = ['S4MIL']


class S4D(nn.Module):
    """A diagonal complex state-space layer: a filter as long as the sequence for each channel, then a gated linear one.

    With a = exp(dt A) and b = (a - 1) / A, the zero-order hold of h' = A h + x, for each channel and state:

        h[t] = a h[t-1] + b x[t],  y[t] = 2 Re (sum over states of C h[t]) + D x[t]
    """

    def __init__(self, dim: int, d_state: int = 64, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        states = d_state // 2  # the others are their conjugates
        self.log_dt = nn.Parameter(torch.empty(dim, **dd).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_A_real = nn.Parameter(torch.full((dim, states), math.log(0.5), **dd))
        self.A_imag = nn.Parameter((math.pi * torch.arange(states, **dd)).repeat(dim, 1))
        self.C = nn.Parameter(torch.randn(dim, states, 2, **dd) * 0.5**0.5)  # real and imaginary part
        self.D = nn.Parameter(torch.randn(dim, **dd))
        self.act = nn.GELU()
        self.out_proj = nn.Linear(dim, 2 * dim, **dd)

    def kernel(self, length: int) -> Tensor:
        """What each channel answers to a one at the first position, without D, (C, length).

        Powers of `a` are products of one of each s-th power and one of the first s, where s is the root of the length:
        so that nothing is written that is as many times as long as there are states.
        """
        log_dt, log_A_real, A_imag, C = (
            p.double() if p.dtype == torch.float64 else p.float()
            for p in (self.log_dt, self.log_A_real, self.A_imag, self.C)
        )
        A = torch.complex(-log_A_real.exp(), A_imag)  # [C, N/2]
        log_a = A * log_dt.exp()[:, None]
        C = torch.view_as_complex(C) * torch.expm1(log_a) / A
        side = math.isqrt(length - 1) + 1
        steps = torch.arange(side, device=A.device)
        near = (log_a[:, :, None] * steps).exp()  # [C, N/2, side]
        far = C[:, None] * (log_a[:, None] * (side * steps[:, None])).exp()  # [C, side, N/2]
        # The real part of the complex product: [C, side, N] @ [C, N, side]
        k = torch.cat([far.real, -far.imag], 2) @ torch.cat([near.real, near.imag], 1)
        return 2 * k.flatten(1)[:, :length]

    def forward(self, x: Tensor) -> Tensor:
        """A sequence, (n, C) -> (n, C)."""
        n = len(x)
        with torch.autocast(x.device.type, enabled=False):  # no Fourier transform is in half precision
            k = self.kernel(n)
            u = x.t().to(k.dtype)  # [n, C] -> [C, n]
            size = 2 * n  # or the end would come round to the beginning
            y = torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(k, size), size)[:, :n]
            y = (y + self.D[:, None] * u).t().to(x.dtype)  # -> [n, C]
        return F.glu(self.out_proj(self.act(y)), dim=-1)


class S4MIL(MIL):
    """S4MIL: linear, an S4D layer along the order of the file, the maximum over all patches, linear.

    Args:
        in_dim: Width of the features.
        num_classes: Number of classes or time bins, or 1 for a risk.
        dim: Width of the tokens.
        d_state: Number of states per channel, an even one, as they are pairs of conjugates.
        pool: 'max', or 'attention', 'gated' or 'mean', which the paper does not have.
        drop_rate: Dropout of the embedded features.
    """

    def __init__(
        self,
        in_dim: int = 1024,
        num_classes: int = 2,
        dim: int = 512,
        d_state: int = 64,
        pool: str = 'max',
        drop_rate: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_dim, num_classes, dim, pool, drop_rate, **dd)
        if d_state < 2 or d_state % 2:
            raise ValueError(f'S4MIL: d_state must be an even number from 2 up, got {d_state!r}.')
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = S4D(dim, d_state, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {f'mixer.{name}' for name in ('log_dt', 'log_A_real', 'A_imag', 'D')}

    def forward_features(
        self, features: Tensor, coords: Tensor | None = None, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        x, patches = super().forward_features(features)  # [n, in_dim] -> [n, C]
        return x + self.mixer(self.norm(x)), patches
