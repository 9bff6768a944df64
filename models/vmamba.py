# SPDX-License-Identifier: Apache-2.0
"""VMamba and 2DVMamba: one network, two scans; and VMamba as it was first published.

Papers:
* `VMamba: Visual State Space Model` (NeurIPS 2024) - https://arxiv.org/abs/2401.10166, whose first version describes
  the older network, named Vanilla VMamba since
* `2DMamba: Efficient State Space Model for Image Representation with Applications on Giga-Pixel Whole Slide Image
  Classification` (CVPR 2025) - https://arxiv.org/abs/2412.00678

Feature maps are channels-last, (batch, height, width, channels), from the stem's first norm to the head.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from . import ssm
from .backbone import Backbone, NormPoolHead, Stage, build_backbone, init_linear, register_aliases, stage_dims
from .layers import Linear, Mlp, in_chunks, in_groups
from .weights.rename import rename_checkpoint, unwrapped

__all__ = ['VMamba']


class Conv3x3s2(nn.Module):
    """Halve the resolution: 3x3 convolution of stride 2, then layer norm."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, C] -> [B, H/2, W/2, C']
        return self.norm(x)


class Stem(nn.Module):
    """Image to tokens at a quarter of its resolution: two 3x3 convolutions of stride 2, each with a layer norm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    @in_groups(growth=8)
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H/2, W/2, C']
        x = self.act(self.norm1(x))
        x = self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # -> [B, H/4, W/4, C'']
        return self.norm2(x)


class PatchMerging(nn.Module):
    """Halve the resolution as Swin does: the positions of every 2x2 cell side by side, layer norm, linear."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim, **dd)
        self.reduction = Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))  # zeros at the bottom and on the right make odd sizes even
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, 2, W/2, 2, C]
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # -> [B, H/2, W/2, 4C], the cell column by column
        return self.reduction(self.norm(x))


class PatchStem(nn.Module):
    """Image to tokens at a quarter of its resolution: a 4x4 convolution of stride 4, then layer norm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))  # [B, C, H, W] -> [B, H/4, W/4, C']


class SS2D(nn.Module):
    """The mixer: a depthwise convolution, then a selective scan of the map in some orders, perhaps with a gate."""

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        scan_ndim: int = 2,
        gate: bool = False,
        orders: Sequence[int] = (0, 1, 2, 3),
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim = int(dim * ssm_ratio)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)
        self.scan_ndim = scan_ndim
        self.orders = list(orders)
        K = len(self.orders)

        self.in_proj = Linear(dim, 2 * inner_dim if gate else inner_dim, bias=False, **dd)
        self.conv = nn.Conv2d(inner_dim, inner_dim, kernel_size=3, padding=1, groups=inner_dim, bias=gate, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, K * (self.dt_rank + 2 * d_state), bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(K, inner_dim, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(K, inner_dim, **dd))
        self.A_log = nn.Parameter(torch.empty(K, inner_dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(K, inner_dim, **dd))
        self.norm = nn.LayerNorm(inner_dim, **dd)
        self.gate_act = nn.SiLU() if gate else None
        self.out_proj = Linear(inner_dim, dim, bias=False, **dd)
        ssm.init_scan_(self.A_log, self.D, self.dt_weight, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_act is None:
            x = self.in_proj(x)  # [B, H, W, C] -> [B, H, W, E]
            return self.out_proj(self.norm(self.scan(x)))
        x, z = self.project(x)
        return self.out_proj(self.norm(self.scan(x)) * self.gate_act(z))

    @in_chunks('in_proj', 2)
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [B, H, W, C] -> two [B, H, W, E]
        return x, z

    def scan(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        # The projections act on one position at a time, so one of them serves all orders: [B, H, W, K, R + 2N]
        proj = self.x_proj(x).unflatten(-1, (len(self.orders), -1))
        dt, B, C = proj.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = ssm.decay_rates(self.A_log)
        return ssm.scan(x, dt, A, B, C, self.D, self.dt_bias, self.dt_weight, ndim=self.scan_ndim, orders=self.orders)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        scan_ndim: int = 2,
        gate: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = SS2D(dim, d_state=d_state, ssm_ratio=ssm_ratio, scan_ndim=scan_ndim, gate=gate, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class VMamba(Backbone):
    """VMamba (1-D scan), 2DVMamba (2-D scan), and Vanilla VMamba (a gate in place of the MLP, patches).

    Takes images of any size from 32x32 up, (batch, in_chans, H, W). A stage works at 1/4, 1/8, 1/16, 1/32 of the
    resolution, odd sizes rounded up; but patches leave out what is no whole patch at the right and the bottom.

    Args:
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, '' for none.
        depths: Number of blocks of each stage.
        dims: Width of each stage, or the first one's, which then doubles at every stage.
        d_state: Number of states per channel, N.
        ssm_ratio: Inner width of the mixer over the stage's width, E / C.
        mlp_ratio: Hidden width of the MLP over the stage's width; 0 for blocks without an MLP.
        scan_ndim: Number of dimensions of the scan, 1 for VMamba, 2 for 2DVMamba.
        gate: Whether a gate multiplies what the mixer's scan gives, and its convolution has a bias.
        patches: Whether the stem cuts patches of 4x4 and stages begin by merging 2x2 of them, in place of convolutions.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: int | tuple[int, ...] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        scan_ndim: int = 2,
        gate: bool = False,
        patches: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        if scan_ndim not in (1, 2):
            raise ValueError(f'VMamba: scan_ndim must be 1 or 2, got {scan_ndim!r}.')
        dims = stage_dims('VMamba', dims, depths)
        block_args: dict[str, Any] = dict(
            d_state=d_state, ssm_ratio=ssm_ratio, mlp_ratio=mlp_ratio, scan_ndim=scan_ndim, gate=gate
        )
        stem_layer, downsample_layer = (PatchStem, PatchMerging) if patches else (Stem, Conv3x3s2)
        stem = stem_layer(in_chans, dims[0], **dd)
        drop_path = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, dim in enumerate(dims):
            downsample = downsample_layer(dims[i - 1], dim, **dd) if i > 0 else nn.Identity()
            stages.append(Stage(downsample, [Block(dim, drop_path=rate, **block_args, **dd) for rate in drop_path[i]]))
        head = NormPoolHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        super().__init__(stem, stages, head, dims, in_chans, num_classes, drop_rate)
        named_apply(init_linear, self)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of a checkpoint, whether under our names or under published ones."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


# The published names, in the order in which the rules apply. The older ones among them are ln_1, self_attention,
# patch_embed.proj, patch_embed.norm, and norm and head at the top.
_RENAMES = (
    (r'^patch_embed\.(0|proj)\.', 'stem.conv1.'),
    (r'^patch_embed\.(2|norm)\.', 'stem.norm1.'),
    (r'^patch_embed\.5\.', 'stem.conv2.'),
    (r'^patch_embed\.7\.', 'stem.norm2.'),
    (r'^(?:classifier\.)?head\.(weight|bias)$', r'head.fc.\1'),
    (r'^(?:classifier\.)?norm\.(weight|bias)$', r'head.norm.\1'),
    (r'^layers\.(\d+)\.downsample\.1\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.conv.'),
    (r'^layers\.(\d+)\.downsample\.3\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.norm.'),
    (r'^layers\.(\d+)\.downsample\.(norm|reduction)\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.{m[2]}.'),
    (r'^layers\.(\d+)\.blocks\.', r'stages.\1.blocks.'),
    (r'^(stages\.\d+\.blocks\.\d+)\.(norm|ln_1)\.', r'\1.norm1.'),
    (r'^(stages\.\d+\.blocks\.\d+)\.ln_2\.', r'\1.norm2.'),
)


# Those of patch merging, in which the numbers mean other layers.
_PATCH_RENAMES = (
    (r'^layers\.(\d+)\.downsample\.1\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.norm.'),
    (r'^layers\.(\d+)\.downsample\.2\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.reduction.'),
    *_RENAMES,
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published checkpoint of this file's networks to our names and shapes by `rename_checkpoint`."""
    merges = any('.downsample.2.' in name for name in unwrapped(state_dict))
    return rename_checkpoint(state_dict, model, _PATCH_RENAMES if merges else _RENAMES)


def _cfg(url: str = '', **kwargs) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'min_input_size': (3, 32, 32),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'license': 'mit' if url else 'apache-2.0',
        **kwargs,
    }


_RELEASE = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
_VANILLA_RELEASE = _RELEASE.replace('v2cls', 'v0cls')

default_cfgs = generate_default_cfgs(
    {
        'vmamba_tiny.in1k': _cfg(url=_RELEASE + 'vssm1_tiny_0230s_ckpt_epoch_264.pth'),
        'vmamba_small.in1k': _cfg(url=_RELEASE + 'vssm_small_0229_ckpt_epoch_222.pth'),
        'vmamba_base.in1k': _cfg(url=_RELEASE + 'vssm_base_0229_ckpt_epoch_237.pth'),
        'vmamba_tiny_s2l5.in1k': _cfg(url=_RELEASE + 'vssm_tiny_0230_ckpt_epoch_262.pth'),
        'vmamba_small_s1l20.in1k': _cfg(url=_RELEASE + 'vssm1_small_0229s_ckpt_epoch_240.pth'),
        'vmamba_base_s1l20.in1k': _cfg(url=_RELEASE + 'vssm1_base_0229s_ckpt_epoch_225.pth'),
        # No weights of 2DVMamba have been published.
        'vmamba2d_tiny.in1k': _cfg(),
        'vmamba2d_small.in1k': _cfg(),
        'vmamba2d_base.in1k': _cfg(),
        'vanilla_vmamba_tiny.in1k': _cfg(url=_VANILLA_RELEASE + 'vssmtiny_dp01_ckpt_epoch_292.pth'),
        'vanilla_vmamba_small.in1k': _cfg(url=_VANILLA_RELEASE + 'vssmsmall_dp03_ckpt_epoch_238.pth'),
        'vanilla_vmamba_base.in1k': _cfg(url=_VANILLA_RELEASE + 'vssmbase_dp06_ckpt_epoch_241.pth'),
        'test_vmamba': _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
        'test_vmamba2d': _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
        'test_vanilla_vmamba': _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs) -> VMamba:
    return build_backbone(VMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


_TINY = dict(depths=(2, 2, 8, 2), dims=96)
_SMALL = dict(depths=(2, 2, 15, 2), dims=96, ssm_ratio=2.0)
_BASE = dict(depths=(2, 2, 15, 2), dims=128, ssm_ratio=2.0)
_VANILLA = dict(d_state=16, ssm_ratio=2.0, mlp_ratio=0.0, scan_ndim=1, gate=True, patches=True)
_TEST = dict(depths=(1, 1, 2, 1), dims=(32, 48, 64, 96))


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_TINY, scan_ndim=1)
    return _create_vmamba('vmamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_SMALL, scan_ndim=1)
    return _create_vmamba('vmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_BASE, scan_ndim=1)
    return _create_vmamba('vmamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(depths=(2, 2, 5, 2), dims=96, ssm_ratio=2.0, scan_ndim=1)
    return _create_vmamba('vmamba_tiny_s2l5', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(depths=(2, 2, 20, 2), dims=96, scan_ndim=1)
    return _create_vmamba('vmamba_small_s1l20', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(depths=(2, 2, 20, 2), dims=128, scan_ndim=1)
    return _create_vmamba('vmamba_base_s1l20', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba2d_tiny(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_TINY, scan_ndim=2)
    return _create_vmamba('vmamba2d_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba2d_small(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_SMALL, scan_ndim=2)
    return _create_vmamba('vmamba2d_small', pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba2d_base(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_BASE, scan_ndim=2)
    return _create_vmamba('vmamba2d_base', pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_VANILLA, depths=(2, 2, 9, 2), dims=96)
    return _create_vmamba('vanilla_vmamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_VANILLA, depths=(2, 2, 27, 2), dims=96)
    return _create_vmamba('vanilla_vmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_VANILLA, depths=(2, 2, 27, 2), dims=128)
    return _create_vmamba('vanilla_vmamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vmamba(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_TEST, scan_ndim=1)
    return _create_vmamba('test_vmamba', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vmamba2d(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_TEST, scan_ndim=2)
    return _create_vmamba('test_vmamba2d', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vanilla_vmamba(pretrained: bool = False, **kwargs) -> VMamba:
    model_args = dict(_VANILLA, **_TEST)
    return _create_vmamba('test_vanilla_vmamba', pretrained, **dict(model_args, **kwargs))


register_aliases(
    __name__,
    {
        '2dvmamba_tiny': 'vmamba2d_tiny',
        '2dvmamba_small': 'vmamba2d_small',
        '2dvmamba_base': 'vmamba2d_base',
        'vmamba_tiny_s1l8': 'vmamba_tiny',
        'vmamba_small_s2l15': 'vmamba_small',
        'vmamba_base_s2l15': 'vmamba_base',
    },
)
