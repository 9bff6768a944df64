# SPDX-License-Identifier: Apache-2.0
"""TransMIL: attention between all patches of a bag, through landmarks, and a class token that gathers it.

Papers:
* `TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image Classification` (NeurIPS
  2021) - https://arxiv.org/abs/2106.00908
* `Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention` (AAAI 2021) -
  https://arxiv.org/abs/2102.03902

Written from the papers. What they leave open is chosen as follows: half as many landmarks as the tokens are wide, 8
heads, 6 steps towards the pseudo-inverse, a convolution of 33 along the values beside the attention; the last segment
of tokens may be shorter than the others, so that attention needs no padding; the slides of a case are one sequence.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import MIL

__all__ = ['TransMIL']


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """An approximation to the pseudo-inverse of matrices, (..., m, m), in steps of third order (2102.03902, eq. 11)."""
    norm = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.mT / norm[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class NystromAttention(nn.Module):
    """Attention whose matrix is approximated through landmarks, the means of segments of the sequence."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        landmarks: int = 256,
        iterations: int = 6,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.landmarks = landmarks
        self.iterations = iterations
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.conv = nn.Conv2d(num_heads, num_heads, (33, 1), padding=(16, 0), groups=num_heads, bias=False, **dd)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The factors of the attention matrix, (h, T, m), (h, m, m) and (h, m, T); and the values, (h, T, d)."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)  # [T, C] -> 3 x [h, T, d]
        with torch.autocast(x.device.type, enabled=False):  # steps to an inverse do not end in half precision
            q, k = (t if t.dtype == torch.float64 else t.float() for t in (q * q.shape[2] ** -0.5, k))
            q_mean, k_mean = self.segment_means(q), self.segment_means(k)  # [h, m, d]
            left = (q @ k_mean.mT).softmax(-1)
            middle = pseudo_inverse((q_mean @ k_mean.mT).softmax(-1), self.iterations)
            right = (q_mean @ k.mT).softmax(-1)
        return left, middle, right, v

    def segment_means(self, x: Tensor) -> Tensor:
        """The means of segments, all but the last of one length, (h, T, d) -> (h, m, d), m at most `landmarks`."""
        tokens = x.shape[1]
        length = math.ceil(tokens / self.landmarks)
        sums = F.pad(x, (0, 0, 0, -tokens % length)).unflatten(1, (-1, length)).sum(2)
        counts = torch.full((sums.shape[1], 1), length, dtype=x.dtype, device=x.device)
        counts[-1] -= -tokens % length
        return sums / counts

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, (T, C) -> (T, C)."""
        left, middle, right, v = self.factors(x)
        y = left @ (middle @ (right @ v.to(right.dtype)))  # -> [h, T, d]
        y = y.to(v.dtype) + self.conv(v[None])[0]
        return self.proj(y.transpose(0, 1).flatten(1))  # -> [T, C]


class PPEG(nn.Module):
    """Pyramid position encoding generator: on the square of tokens, depthwise convolutions of three sizes, summed."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, **dd) for size in (7, 5, 3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """A class token and the tokens of a square, (1 + side^2, C) -> (1 + side^2, C)."""
        side = math.isqrt(len(x) - 1)
        square = x[1:].t().unflatten(1, (side, side))[None]  # -> [1, C, side, side]
        square = square + sum(conv(square) for conv in self.convs)
        return torch.cat([x[:1], square[0].flatten(1).t()])


class TransformerPool(nn.Module):
    """A class token and two layers of attention with position encodings between them; what the class token becomes."""

    def __init__(self, dim: int, num_heads: int, landmarks: int, iterations: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, dim, **dd))
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn1 = NystromAttention(dim, num_heads, landmarks, iterations, **dd)
        self.pos_embed = PPEG(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.attn2 = NystromAttention(dim, num_heads, landmarks, iterations, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def first_layer(self, x: Tensor) -> Tensor:
        """Tokens, (T, C) -> the class token and those of a square, (1 + side^2, C); the first ones are taken twice."""
        side = math.isqrt(len(x) - 1) + 1
        x = torch.cat([self.cls_token.to(x.dtype), x, x[: side * side - len(x)]])
        x = x + self.attn1(self.norm1(x))
        return self.pos_embed(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_layer(x)
        x = x + self.attn2(self.norm2(x))
        return self.norm(x[:1])  # [1 + side^2, C] -> [1, C]

    def weights(self, x: Tensor) -> Tensor:
        """The class token's attention to each token in the second layer, the mean over the heads, (T, C) -> (T,).

        The approximation may have values below 0, which are shown as 0. What is taken twice has the sum of both.
        """
        left, middle, right, _ = self.attn2.factors(self.norm2(self.first_layer(x)))
        row = (left[:, :1] @ middle @ right).mean(0)[0, 1:]  # [h, 1, 1 + side^2] -> [side^2]
        once, twice = row.split([len(x), len(row) - len(x)])
        return (once + F.pad(twice, (0, len(once) - len(twice)))).clamp_min(0).to(x.dtype)


class TransMIL(MIL):
    """TransMIL: linear, ReLU, two layers of approximate attention with convolutions between them, class token, linear.

    Args:
        in_dim: Width of the features.
        num_classes: Number of classes or time bins, or 1 for a risk.
        dim: Width of the tokens.
        num_heads: Number of heads of the attention.
        landmarks: Most landmarks of the attention, half of dim unless given. With as many as there are tokens or more
            the attention is exact but for the pseudo-inverse.
        iterations: Steps towards the pseudo-inverse.
        drop_rate: Dropout of the embedded features.
    """

    def __init__(
        self,
        in_dim: int = 1024,
        num_classes: int = 2,
        dim: int = 512,
        num_heads: int = 8,
        landmarks: int | None = None,
        iterations: int = 6,
        drop_rate: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_dim, num_classes, dim, 'mean', drop_rate, **dd)
        landmarks = dim // 2 if landmarks is None else landmarks
        if dim % num_heads or landmarks < 1:
            raise ValueError(
                f'TransMIL: num_heads must divide dim and landmarks be 1 or more, got {num_heads}, {dim} and '
                f'{landmarks}.'
            )
        self.act = nn.ReLU()
        self.pool = TransformerPool(dim, num_heads, landmarks, iterations, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'pool.cls_token'}
