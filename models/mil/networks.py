# SPDX-License-Identifier: Apache-2.0
"""Multiple-instance learning on whole slides: the baselines that embed and pool, 2DMambaMIL, and its 1-D variant.

Papers:
* `2DMamba: Efficient State Space Model for Image Representation with Applications on Giga-Pixel Whole Slide Image
  Classification` (CVPR 2025) - https://arxiv.org/abs/2412.00678
* `Attention-based Deep Multiple Instance Learning` (ICML 2018) - https://arxiv.org/abs/1802.04712

A slide is a bag of patches: the features that a frozen encoder gives them, (n, in_dim), and their pixel coordinates,
(n, 2), x before y.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .. import ssm
from ..weights.rename import rename_checkpoint
from .grid import FOLD, check_memory, fold_gaps, shorten_gaps, side_of_cells, to_cells
from .pooling import POOLS

__all__ = ['MIL', 'MambaMIL', 'checkpoint_filter_fn']


class MIL(nn.Module):
    """Embed every patch, pool, classify: attention MIL, and mean and max pooling. Blind to where a patch lies.

    Args:
        in_dim: Width of the features.
        num_classes: Number of classes or time bins, or 1 for a risk.
        dim: Width of the tokens.
        pool: 'attention', 'gated' for attention with a gate, 'mean' or 'max'.
        drop_rate: Dropout of the embedded features.
    """

    heads: tuple[str, ...] = ('head',)  # the modules that another number of classes changes

    def __init__(
        self,
        in_dim: int = 1024,
        num_classes: int = 2,
        dim: int = 128,
        pool: str = 'attention',
        drop_rate: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f'{type(self).__name__}: pool must be one of {", ".join(POOLS)}, got {pool!r}.')
        self.in_dim = in_dim
        self.num_classes = num_classes
        self.embed = nn.Linear(in_dim, dim, **dd)
        self.act: nn.Module = nn.GELU()
        self.drop = nn.Dropout(drop_rate)
        self.pool: Any = POOLS[pool](dim, **dd) if pool in ('attention', 'gated') else POOLS[pool]()
        self.head = nn.Linear(dim, num_classes, **dd)

    def forward_features(
        self, features: Tensor, coords: Tensor | None = None, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One slide -> its tokens, as they are pooled, (T, dim); and the index of each patch among them, (n,).

        Args:
            features: Features of the patches, (n, in_dim).
            coords: Pixel coordinates, (n, 2), which this network does not use.
            step: Distance of neighbouring patches, which this network does not use.
        """
        x = self.drop(self.act(self.embed(features)))  # [n, in_dim] -> [n, C]
        return x, torch.arange(len(x), device=x.device)

    def forward(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        steps: Sequence[int | None] | None = None,
    ) -> Tensor:
        """A bag -> its logits, (1, num_classes).

        Args:
            features: Features of the patches of one slide, or of all slides of a case one after the other, (n, in_dim).
            coords: Pixel coordinates of the patches within their slide, (n, 2), x before y.
            lengths: Number of patches of each slide, one slide unless given. Slides are pooled together.
            steps: Distance of neighbouring patches in pixels for each slide, None for those of which it is not known.

        Raises:
            ValueError: An argument has another form, or the coordinates make no grid, see `to_cells`.
        """
        tokens, _ = self.forward_slides(features, coords, lengths, steps)
        return self.head(self.pool(tokens))  # [T, C] -> [1, C] -> [1, num_classes]

    def forward_train(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        steps: Sequence[int | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A bag -> its logits, (1, num_classes), and those of P parts of it that learn its label too, (P, num_classes).

        There are no parts, P = 0, but in networks whose training has a second loss. Arguments and errors are those of
        forward.
        """
        logits = self(features, coords, lengths, steps)
        return logits, logits[:0]

    def attention(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        steps: Sequence[int | None] | None = None,
    ) -> Tensor:
        """The weight of each patch in the pooling, (n,). Their sum is 1, less the weights of cells without a patch.

        Args:
            features: Features of the patches of one slide, or of all slides of a case one after the other, (n, in_dim).
            coords: Pixel coordinates of the patches within their slide, (n, 2), x before y.
            lengths: Number of patches of each slide, one slide unless given.
            steps: Distance of neighbouring patches in pixels for each slide, None for those of which it is not known.

        Raises:
            ValueError: The pooling has no weights, an argument has another form, or the coordinates make no grid.
        """
        if not hasattr(self.pool, 'weights'):
            raise ValueError(f'{type(self).__name__}: attention needs a pooling with weights, got that by the maximum.')
        tokens, patches = self.forward_slides(features, coords, lengths, steps)
        return self.pool.weights(tokens)[patches]

    def forward_slides(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        steps: Sequence[int | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A bag -> the tokens of its slides, (T, dim), and the index of each patch among them, (n,); see forward."""
        tokens, patches, total = [], [], 0
        for slide in self._slides(features, coords, lengths, steps):
            x, index = self.forward_features(*slide)
            tokens.append(x)
            patches.append(index + total)
            total += len(x)
        return torch.cat(tokens), torch.cat(patches)

    def _slides(
        self,
        features: Tensor,
        coords: Tensor | None,
        lengths: Sequence[int] | None,
        steps: Sequence[int | None] | None,
    ) -> list[tuple[Tensor, Tensor | None, int | None]]:
        """The arguments of forward_features for each slide."""
        name = type(self).__name__
        if features.ndim != 2 or features.shape[1] != self.in_dim or not len(features):
            raise ValueError(f'{name}: features must be (n, {self.in_dim}) with n >= 1, got {tuple(features.shape)}.')
        if coords is not None and coords.shape != (len(features), 2):
            raise ValueError(f'{name}: coords must be {(len(features), 2)}, got {tuple(coords.shape)}.')
        lengths = [len(features)] if lengths is None else list(lengths)
        if not all(length >= 1 for length in lengths) or sum(lengths) != len(features):
            raise ValueError(f'{name}: lengths must be positive and add up to {len(features)}, got {lengths}.')
        parts = coords.split(lengths) if coords is not None else [None] * len(lengths)
        steps = [None] * len(lengths) if steps is None else list(steps)
        if len(steps) != len(lengths) or not all(step is None or step >= 1 for step in steps):
            raise ValueError(f'{name}: steps must be {len(lengths)} numbers from 1 up, or None, got {steps}.')
        return list(zip(features.split(lengths), parts, steps, strict=True))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load tensors under our names or published ones; all else as nn.Module does."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


class MambaMixer(nn.Module):
    """Mamba's mixer on the map of a slide: a causal depthwise convolution, one selective scan in order 0, a gate."""

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        inner_norms: bool = False,
        scan_ndim: int = 2,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim = int(dim * ssm_ratio)
        self.dt_rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.scan_ndim = scan_ndim

        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.conv = nn.Conv1d(inner_dim, inner_dim, kernel_size=4, padding=3, groups=inner_dim, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_norm = nn.RMSNorm(self.dt_rank, eps=1e-5, **dd) if inner_norms else nn.Identity()
        self.B_norm = nn.RMSNorm(d_state, eps=1e-5, **dd) if inner_norms else nn.Identity()
        self.C_norm = nn.RMSNorm(d_state, eps=1e-5, **dd) if inner_norms else nn.Identity()
        self.dt_weight = nn.Parameter(torch.empty(1, inner_dim, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(1, inner_dim, **dd))
        self.A_log = nn.Parameter(torch.empty(1, inner_dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(1, inner_dim, **dd))
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)
        ssm.init_scan_(self.A_log, self.D, self.dt_weight, self.dt_bias)

    def forward(self, x: Tensor, tissue: Tensor | None = None, folded: Tensor | None = None) -> Tensor:
        """The map of a slide, (H, W, C) -> (H, W, C).

        Args:
            x: The map.
            tissue: Where it has patches, (H, W, 1), True or False, if the other cells, zero in x, are to take no part:
                they add nothing to a state, which fades across them as the step's bias says; the convolution begins
                anew with each row, or it would see the end of the row before; and what comes out there is zero.
            folded: Where a cell without a patch stands for FOLD in a row or column, (H, W), True or False.
        """
        H, W, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [H, W, C] -> 2 x [H, W, E]
        x = (x if tissue is not None else x.reshape(1, H * W, -1)).transpose(1, 2)  # -> [1, E, H W] or [H, E, W]
        x = self.conv(x)[..., : x.shape[2]].transpose(1, 2).contiguous()  # one copy, or each that follows makes its own
        x = self.act(x).reshape(1, H, W, -1)  # -> [1, H, W, E]
        if tissue is not None:
            x = x * tissue
        proj = self.x_proj(x).unsqueeze(3)  # -> [1, H, W, K = 1, R + 2N]
        dt, B, C = proj.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = self.dt_norm(dt)
        dt_weight: Tensor = self.dt_weight
        if folded is not None:
            # A state fades across FOLD cells as across one whose step is as much longer: a rank more, in such cells.
            long_step = FOLD * F.softplus(self.dt_bias)  # [K, E]
            more = long_step + (-torch.expm1(-long_step)).log() - self.dt_bias  # softplus' inverse
            dt = torch.cat([dt, folded[None, :, :, None, None].to(dt.dtype)], -1)  # -> [1, H, W, K, R + 1]
            dt_weight = torch.cat([dt_weight, more[..., None]], -1)
        y = ssm.scan(
            x,
            dt,
            ssm.decay_rates(self.A_log),
            self.B_norm(B),
            self.C_norm(C),
            self.D,
            self.dt_bias,
            dt_weight,
            ndim=self.scan_ndim,
            orders=[0],
        )
        return self.out_proj(y[0] * F.silu(z))  # [H, W, E] -> [H, W, C]


class MambaBlock(nn.Module):
    def __init__(self, dim: int, device=None, dtype=None, **mixer_args: Any) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5, **dd)
        self.mixer = MambaMixer(dim, **mixer_args, **dd)

    def forward(self, x: Tensor, tissue: Tensor | None = None, folded: Tensor | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), tissue, folded)


class MambaMIL(MIL):
    """2DMambaMIL (2-D scan), and its 1-D variant: embed every patch, mix them by state-space blocks, pool, classify.

    The 2-D network puts the patches on the slide's grid. In a cell without a patch stands a pad token, which takes part
    in scan, convolution and pooling as in the published code; with pad_token='none' such cells take no part, and what
    surrounds the tissue's bounding box changes nothing. The 1-D network runs over the patches in the order of the file.

    Args:
        in_dim: Width of the features.
        num_classes: Number of classes or time bins, or 1 for a risk.
        dim: Width of the tokens.
        depth: Number of blocks.
        scan_ndim: Dimensions of the scan, 2 on the grid, 1 in the order of the file.
        patch_size: Side of a grid cell in the pixels of the coordinates, for slides that come without a step, 512
            unless given; a slide's step must not contradict it.
        grid_size: Height and width of the grid in cells; unless given, the grid ends with the slide's last patch.
        crop: Whether the grid begins with the slide's first patch, which leaves fewer pad tokens to compute.
        max_gap: Most empty rows, or columns, in a stretch; what a longer one has beyond is left out. None leaves all.
        pad_token: 'learned', 'zero' or 'none'.
        d_state: Number of states per channel, N.
        ssm_ratio: Inner width of the mixer over dim.
        inner_norms: Whether step, B and C have RMS norms.
        pool: 'attention', 'gated' for attention with a gate, 'mean' or 'max'.
        drop_rate: Dropout of the embedded features.
    """

    def __init__(
        self,
        in_dim: int = 1024,
        num_classes: int = 2,
        dim: int = 128,
        depth: int = 1,
        scan_ndim: int = 2,
        patch_size: int | None = None,
        grid_size: tuple[int, int] | None = None,
        crop: bool = False,
        max_gap: int | None = None,
        pad_token: str = 'learned',
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        inner_norms: bool = False,
        pool: str = 'attention',
        drop_rate: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_dim, num_classes, dim, pool, drop_rate, **dd)
        if scan_ndim not in (1, 2):
            raise ValueError(f'MambaMIL: scan_ndim must be 1 or 2, got {scan_ndim!r}.')
        if pad_token not in ('learned', 'zero', 'none'):
            raise ValueError(f"MambaMIL: pad_token must be 'learned', 'zero' or 'none', got {pad_token!r}.")
        if crop and grid_size is not None:
            raise ValueError(
                f'MambaMIL: crop leaves grid_size to the tissue, so that it must be None, got {grid_size}.'
            )
        if max_gap is not None and (max_gap < 0 or grid_size is not None or pad_token == 'none'):
            raise ValueError(
                'MambaMIL: max_gap must be 0 or more, and be left out with a grid_size or without a pad token, got '
                f'{max_gap}.'
            )
        self.scan_ndim = scan_ndim
        self.patch_size = patch_size
        self.grid_size: tuple[int, int] | None = None
        if grid_size is not None:
            height, width = grid_size
            self.grid_size = (height, width)
        self.crop = crop
        self.max_gap = max_gap
        self.inner_dim = int(dim * ssm_ratio)
        if scan_ndim == 1 or pad_token == 'none':
            self.pad_token = None
        elif pad_token == 'zero':  # which the published files hold too
            self.register_buffer('pad_token', torch.zeros(dim, **dd))
        else:
            self.pad_token = nn.Parameter(torch.empty(dim, **dd))
            trunc_normal_(self.pad_token, std=0.02)
        block_args = dict(d_state=d_state, ssm_ratio=ssm_ratio, inner_norms=inner_norms, scan_ndim=scan_ndim)
        self.blocks = nn.ModuleList([MambaBlock(dim, **block_args, **dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'pad_token', 'blocks.*.mixer.A_log', 'blocks.*.mixer.D', 'blocks.*.mixer.dt_bias'}

    def forward_features(
        self, features: Tensor, coords: Tensor | None = None, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One slide -> its tokens, as they are pooled, (T, dim); and the index of each patch among them, (n,).

        Args:
            features: Features of the patches, (n, in_dim).
            coords: Pixel coordinates, (n, 2), which the 1-D network does not use.
            step: Distance of neighbouring patches in pixels, the side of a grid cell; patch_size unless given.
        """
        x, patches = super().forward_features(features)  # [n, in_dim] -> [n, C]
        if self.scan_ndim == 1:
            for block in self.blocks:
                x = block(x[None])[0]  # a map of one row
            return self.norm(x), patches

        if coords is None:
            raise ValueError('MambaMIL: coords must be (n, 2) for a 2-D scan, got None.')
        cells, grid = to_cells(coords, side_of_cells(step, self.patch_size), self.grid_size, self.crop)
        tissue = folded = None
        if self.max_gap is not None:
            cells, grid = shorten_gaps(cells, grid, self.max_gap)
        if self.pad_token is None:
            cells, grid, folded = fold_gaps(cells, grid)
            tissue = cells.new_zeros(grid[0] * grid[1], 1).index_fill(0, cells, 1).bool().unflatten(0, grid)
        maps = 3 + 9 * len(self.blocks) if torch.is_grad_enabled() else 7  # of the inner width, as measured on a CPU
        check_memory(grid, maps * self.inner_dim, x.device)
        pad = x.new_zeros(x.shape[1]) if self.pad_token is None else self.pad_token.to(x.dtype)
        x = pad.expand(grid[0] * grid[1], -1).index_copy(0, cells, x).unflatten(0, grid)  # [n, C] -> [H, W, C]
        for block in self.blocks:
            x = block(x, tissue, folded)
        x = x.flatten(0, 1)  # -> [H W, C]
        if tissue is not None:
            return self.norm(x[cells]), patches
        return self.norm(x), cells


# Rules from published names to ours, in the order in which they apply.
_RENAMES = (
    (r'^_fc1\.0\.', 'embed.'),
    (r'^attention\.0\.', 'pool.fc1.'),
    (r'^attention\.2\.', 'pool.fc2.'),
    (r'^classifier\.', 'head.'),
    (r'^layers\.pad_token$', 'pad_token'),
    (r'^layers\.layers\.', 'blocks.'),
    (r'\.mixer\.conv1d\.', '.mixer.conv.'),
    (r'\.mixer\.dt_proj\.weight$', '.mixer.dt_weight'),
    (r'\.mixer\.dt_proj\.bias$', '.mixer.dt_bias'),
    (r'\.mixer\.(dt|B|C)_layernorm\.', r'.mixer.\1_norm.'),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published 2DMambaMIL checkpoint to our names and shapes, see `rename_checkpoint`.

    The published 1-D network keeps a pad token that it does not use.
    """
    state_dict = rename_checkpoint(state_dict, model, _RENAMES)
    if getattr(model, 'scan_ndim', None) == 1:
        state_dict = {name: value for name, value in state_dict.items() if name != 'pad_token'}
    return state_dict
