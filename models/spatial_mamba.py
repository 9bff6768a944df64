# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba: one scan in raster order, whose states are then fused over their neighbourhood.

Paper: `Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion` (ICLR 2025)
- https://arxiv.org/abs/2410.15091

Feature maps are channels-last, (batch, height, width, channels), from the end of the stem to the head.
"""

import math
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, named_apply, register_model, register_notrace_module
from torch import Tensor, nn

from . import ssm
from .backbone import Backbone, NormPoolHead, Stage, build_backbone, init_linear, register_aliases, stage_dims
from .layers import Linear, Mlp, in_chunks, in_groups, in_one_pass
from .weights.rename import rename_checkpoint

__all__ = ['SpatialMamba']


class Stem(nn.Module):
    """Image to tokens at a quarter of its resolution: five convolutions, each with a batch norm."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        norm_args = dict(momentum=bn_momentum, eps=bn_eps, **dd)
        super().__init__()
        mid_dim = dim // 2
        self.conv1 = nn.Conv2d(in_chans, mid_dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(mid_dim, **norm_args)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(mid_dim, mid_dim, kernel_size=3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(mid_dim, **norm_args)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(mid_dim, mid_dim, kernel_size=3, padding=1, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(mid_dim, **norm_args)
        self.conv4 = nn.Conv2d(mid_dim, 4 * dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm4 = nn.BatchNorm2d(4 * dim, **norm_args)
        self.act4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(4 * dim, dim, kernel_size=1, bias=False, **dd)
        self.norm5 = nn.BatchNorm2d(dim, **norm_args)

    @in_groups(growth=8)
    def forward(self, x: Tensor) -> Tensor:
        # Channels last in memory, so that what follows is too, and the last permute a view. Not by memory_format, which
        # vmap does not know.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.act1(self.norm1(self.conv1(x)))  # [B, C, H, W] -> [B, C', H/2, W/2]
        x = x + self.norm3(self.conv3(self.act2(self.norm2(self.conv2(x)))))
        x = self.act4(self.norm4(self.conv4(x)))  # -> [B, 4C'', H/4, W/4]
        return self.norm5(self.conv5(x)).permute(0, 2, 3, 1)  # -> [B, H/4, W/4, C'']


class Downsample(nn.Module):
    """Halve the resolution: a depthwise convolution of stride 2 between two of 1x1, batch norm."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        hidden_dim = 4 * dim
        self.conv1 = nn.Conv2d(in_dim, hidden_dim, kernel_size=1, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, stride=2, padding=1, groups=hidden_dim, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(hidden_dim, dim, kernel_size=1, **dd)
        self.norm = nn.BatchNorm2d(dim, momentum=bn_momentum, eps=bn_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(x)
        return self.norm(x).permute(0, 2, 3, 1)  # -> [B, H/2, W/2, C']

    @in_groups(growth=8, while_training=True, parts=('conv1', 'act1', 'conv2', 'act2', 'conv3'))
    def convolve(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x.permute(0, 3, 1, 2)))  # [B, H, W, C] -> [B, 4C', H, W]
        x = self.act2(self.conv2(x))  # -> [B, 4C', H/2, W/2]
        return self.conv3(x)  # -> [B, C', H/2, W/2]


class StateFusion(nn.Module):
    """The paper's structure-aware fusion: sum the states over three dilated 3x3 neighbourhoods.

    Nothing is merged ahead: the op takes the weights as they are now, in training and in evaluation.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.kernel_3 = nn.Parameter(torch.ones(dim, 1, 3, 3, **dd))  # dilation 1
        self.kernel_3_1 = nn.Parameter(torch.ones(dim, 1, 3, 3, **dd))  # dilation 3
        self.kernel_3_2 = nn.Parameter(torch.ones(dim, 1, 3, 3, **dd))  # dilation 5
        self.alpha = nn.Parameter(torch.ones(3, **dd))

    def forward(self, h: Tensor) -> Tensor:
        kernels = torch.cat([self.kernel_3, self.kernel_3_1, self.kernel_3_2]).unflatten(0, (3, -1))  # [3, E, 1, 3, 3]
        weight = self.alpha.view(3, 1, 1, 1) * kernels.squeeze(2)
        return ssm.fuse_states(h, weight)


@register_notrace_module  # a node of timm's FX graphs, so that its shortcuts are taken there
class SpatialMixer(nn.Module):
    """The mixer: a depthwise convolution, one scan for the states, their fusion, and a gate."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim = 2 * dim
        self.dt_rank = math.ceil(dim / 16)
        self.orders = [0]

        self.in_proj = Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.conv = nn.Conv2d(inner_dim, inner_dim, kernel_size=3, padding=1, groups=inner_dim, **dd)
        self.conv_act = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(1, inner_dim, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(1, inner_dim, **dd))
        self.A_log = nn.Parameter(torch.empty(1, inner_dim, 1, **dd))
        self.D = nn.Parameter(torch.empty(1, inner_dim, **dd))
        self.fusion = StateFusion(inner_dim, **dd)
        self.norm = nn.LayerNorm(inner_dim, **dd)
        self.act = nn.SiLU()
        self.out_proj = Linear(inner_dim, dim, bias=False, **dd)
        ssm.init_scan_(self.A_log, self.D, self.dt_weight, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        # Names are used again, so that few of these wide maps live at a time.
        x, z = self.project(x)
        x = self.conv_act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        dt, B, C = self.x_proj(x).split([self.dt_rank, 1, 1], dim=-1)
        dt, B = dt.unsqueeze(3), B.unsqueeze(3)  # [B, H, W, K, R], [B, H, W, K, N] with K = N = 1
        A = ssm.decay_rates(self.A_log)
        y = ssm.scan(x, dt, A, B, None, None, self.dt_bias, self.dt_weight, ndim=1, orders=self.orders)  # the states
        y = self.read_out(self.fusion(y), x, C, z)
        return self.out_proj(y)

    @in_chunks('in_proj', 2)
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [B, H, W, C] -> two [B, H, W, E]
        return x, z

    @in_one_pass
    def read_out(self, h: Tensor, x: Tensor, C: Tensor, z: Tensor) -> Tensor:
        y = torch.addcmul(self.D.to(x.dtype) * x, C, h)  # [B, H, W, E]
        return self.norm(y) * self.act(z)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = SpatialMixer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, C], positions by their neighbours
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        x = x + self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SpatialMamba(Backbone):
    """Spatial-Mamba.

    Takes images of any size from 32x32 up, (batch, in_chans, H, W). A stage works at 1/4, 1/8, 1/16, 1/32 of the
    resolution, odd sizes rounded up.

    Args:
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, '' for none.
        depths: Number of blocks of each stage.
        dims: Width of each stage, or the first one's, which then doubles at every stage.
        mlp_ratio: Hidden width of the MLP over the stage's width.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        bn_momentum: Weight of a new batch in the running statistics of the batch norms.
        bn_eps: Smallest variance of the batch norms, added to every variance.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: tuple[int, ...] = (2, 4, 8, 4),
        dims: int | tuple[int, ...] = 64,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        bn_args: dict[str, Any] = dict(bn_momentum=bn_momentum, bn_eps=bn_eps)
        dims = stage_dims('SpatialMamba', dims, depths)
        stem = Stem(in_chans, dims[0], **bn_args, **dd)
        drop_path = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, dim in enumerate(dims):
            downsample = Downsample(dims[i - 1], dim, **bn_args, **dd) if i > 0 else nn.Identity()
            blocks = [Block(dim, mlp_ratio=mlp_ratio, drop_path=rate, **dd) for rate in drop_path[i]]
            stages.append(Stage(downsample, blocks))
        head = NormPoolHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        super().__init__(stem, stages, head, dims, in_chans, num_classes, drop_rate)
        named_apply(init_linear, self)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of a checkpoint, whether under our names or under published ones."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


# The published names, in the order in which the rules apply.
_RENAMES = (
    (r'^patch_embed\.conv1\.(conv|norm)\.', r'stem.\g<1>1.'),
    (r'^patch_embed\.conv2\.(\d)\.(conv|norm)\.', lambda m: f'stem.{m[2]}{int(m[1]) + 2}.'),
    (r'^patch_embed\.conv3\.(\d)\.(conv|norm)\.', lambda m: f'stem.{m[2]}{int(m[1]) + 4}.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^norm\.(weight|bias)$', r'head.norm.\1'),
    (r'^layers\.(\d+)\.downsample\.conv\.2\.norm\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.norm.'),
    (
        r'^layers\.(\d+)\.downsample\.conv\.(\d)\.conv\.',
        lambda m: f'stages.{int(m[1]) + 1}.downsample.conv{int(m[2]) + 1}.',
    ),
    (r'^layers\.(\d+)\.blocks\.', r'stages.\1.blocks.'),
    (r'^(stages\.\d+\.blocks\.\d+)\.ln_([12])\.', r'\1.norm\2.'),
    (r'\.state_fusion\.', '.fusion.'),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published Spatial-Mamba checkpoint to our names and shapes by `rename_checkpoint`."""
    return rename_checkpoint(state_dict, model, _RENAMES)


def _cfg(drive_id: str = '', **kwargs) -> dict[str, Any]:
    return {
        'url': '',
        # No URL that timm could load: `vssm download` fetches, converts and caches the file.
        'origin_url': f'https://drive.google.com/uc?id={drive_id}' if drive_id else None,
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
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'spatial_mamba_tiny.in1k': _cfg('19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW'),
        'spatial_mamba_small.in1k': _cfg('1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O'),
        'spatial_mamba_base.in1k': _cfg('1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM'),
        'test_spatial_mamba': _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
    }
)


def _create_spatial_mamba(variant: str, pretrained: bool = False, **kwargs) -> SpatialMamba:
    return build_backbone(SpatialMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def spatial_mamba_tiny(pretrained: bool = False, **kwargs) -> SpatialMamba:
    model_args = dict(depths=(2, 4, 8, 4), dims=64)
    return _create_spatial_mamba('spatial_mamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def spatial_mamba_small(pretrained: bool = False, **kwargs) -> SpatialMamba:
    model_args = dict(depths=(2, 4, 21, 5), dims=64)
    return _create_spatial_mamba('spatial_mamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def spatial_mamba_base(pretrained: bool = False, **kwargs) -> SpatialMamba:
    model_args = dict(depths=(2, 4, 21, 5), dims=96)
    return _create_spatial_mamba('spatial_mamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def test_spatial_mamba(pretrained: bool = False, **kwargs) -> SpatialMamba:
    model_args = dict(depths=(1, 1, 2, 1), dims=(32, 48, 64, 96))
    return _create_spatial_mamba('test_spatial_mamba', pretrained, **dict(model_args, **kwargs))


register_aliases(
    __name__,
    {
        'spatialmamba_tiny': 'spatial_mamba_tiny',
        'spatialmamba_small': 'spatial_mamba_small',
        'spatialmamba_base': 'spatial_mamba_base',
    },
)
