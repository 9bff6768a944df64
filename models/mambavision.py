# SPDX-License-Identifier: Apache-2.0
"""MambaVision: convolutions at high resolution, then windows in which scans come first and attention last.

Paper: `MambaVision: A Hybrid Mamba-Transformer Vision Backbone` (CVPR 2025) - https://arxiv.org/abs/2407.08083

The network is written from the paper and a description. The published weights are NVIDIA's, under CC-BY-NC-SA-4.0: for
non-commercial use alone.

Feature maps are (batch, channels, height, width), with the channels last in memory.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention as TimmAttention
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from . import ssm
from .backbone import Backbone, NormPoolHead, Stage, build_backbone, init_linear, register_aliases, stage_dims
from .layers import Linear, Mlp, in_chunks, in_groups
from .weights.identify import first_blocks, pyramid_args
from .weights.rename import rename_checkpoint

__all__ = ['MambaVision']

_CONV_STAGES = 2  # the first ones; all further ones work in windows


class Stem(nn.Module):
    """Image to a map at a quarter of its resolution: two 3x3 convolutions of stride 2, each with a batch norm."""

    def __init__(self, in_chans: int, mid_dim: int, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, mid_dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(mid_dim, eps=1e-4, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(mid_dim, dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4, **dd)
        self.act2 = nn.ReLU(inplace=True)

    @in_groups(growth=8)
    def forward(self, x: Tensor) -> Tensor:
        # Channels last in memory, so that what follows is too, and a cut into windows moves whole tokens. Not by
        # memory_format, which vmap does not know.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.act1(self.norm1(self.conv1(x)))  # [B, C, H, W] -> [B, C', H/2, W/2]
        return self.act2(self.norm2(self.conv2(x)))  # -> [B, C'', H/4, W/4]


class ConvBlock(nn.Module):
    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate='tanh')
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.norm2(self.conv2(y)))


class MambaVisionMixer(nn.Module):
    """The paper's mixer of tokens, (B, L, C): a short convolution and a scan of one half, the other half beside it.

    The convolution looks both ways, and the other half goes through one of its own in place of a gate, so that what the
    scan does not see is kept.
    """

    def __init__(self, dim: int, d_state: int = 8, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim = dim // 2
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)
        self.orders = [0]

        self.in_proj = Linear(dim, dim, bias=False, **dd)
        conv_args: dict[str, Any] = dict(kernel_size=(1, 3), padding=(0, 1), groups=inner_dim, bias=False, **dd)
        self.conv_x = nn.Conv2d(inner_dim, inner_dim, **conv_args)
        self.act_x = nn.SiLU()
        self.conv_z = nn.Conv2d(inner_dim, inner_dim, **conv_args)
        self.act_z = nn.SiLU()
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(1, inner_dim, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(1, inner_dim, **dd))
        self.A_log = nn.Parameter(torch.empty(1, inner_dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(1, inner_dim, **dd))
        self.out_proj = Linear(dim, dim, bias=False, **dd)
        ssm.init_scan_(self.A_log, self.D, self.dt_weight, self.dt_bias)
        # The authors initialise every linear layer alike, in the end, and so those of the steps.
        for weight in (self.x_proj.weight, self.dt_weight):
            trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.project(x.unsqueeze(1))  # [B, L, C] -> two maps of one row, [B, 1, L, C/2]
        x = self.act_x(self.conv_x(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        z = self.act_z(self.conv_z(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = torch.cat([self.scan(x), z], dim=-1).squeeze(1)  # -> [B, L, C]
        return self.out_proj(x)

    @in_chunks('in_proj', 2)
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return x, z

    def scan(self, x: Tensor) -> Tensor:
        proj = self.x_proj(x).unsqueeze(3)  # [B, 1, L, K, R + 2N] with K = 1
        dt, B, C = proj.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = ssm.decay_rates(self.A_log)
        # Twice, as the authors' linear layer of the steps adds its bias, and their scan adds it again. The parameter is
        # theirs, so that it learns as fast.
        dt_bias = 2 * self.dt_bias
        return ssm.scan(x, dt, A, B, C, self.D, dt_bias, self.dt_weight, ndim=1, orders=self.orders)


class Attention(TimmAttention):
    """timm's attention with our linear layers.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, device='meta')  # its linear layers, which draw no random numbers, make way
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)


class Block(nn.Module):
    """Mixer and MLP of the tokens of windows, (B * windows, L, C)."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class WindowStage(Stage):
    """A stage whose blocks see windows.

    A map whose sides are no multiples of the window's is padded with zeros at the right and the bottom, which take part
    in all blocks like any token, and then cut off.

    Args:
        downsample: Map to this stage's resolution and width.
        blocks: Blocks of this width.
        window_size: Side of the windows, in positions of the map.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window_size: int) -> None:
        super().__init__(downsample, blocks)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        B, C, H, W = x.shape
        size = self.window_size
        h, w = (H + size - 1) // size, (W + size - 1) // size  # the windows in a column and in a row
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, w * size - W, 0, h * size - H))  # -> [B, h * size, w * size, C]
        x = x.reshape(B, h, size, w, size, C).transpose(2, 3).reshape(B * h * w, size * size, C)
        x = self.mix(x)
        x = x.reshape(B, h, w, size, size, C).transpose(2, 3).reshape(B, h * size, w * size, C)[:, :H, :W]
        return self.norm(x.permute(0, 3, 1, 2))


class MambaVision(Backbone):
    """MambaVision.

    Takes images of any size from 32x32 up, (batch, in_chans, H, W). A stage works at 1/4, 1/8, 1/16, 1/32 of the
    resolution, odd sizes rounded up. The windows keep their size, whatever the image's.

    Args:
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, '' for none.
        depths: Number of blocks of each stage. The first two are stages of convolutions; in the others the first half
            of the blocks, or one more, has the mixer, and the rest attention.
        dims: Width of each stage, or the first one's, which then doubles at every stage.
        stem_dim: Width between the convolutions of the stem.
        num_heads: Number of attention heads of each stage, which the stages of convolutions have no use for.
        window_size: Side of each stage's windows, which the stages of convolutions have no use for.
        mlp_ratio: Hidden width of the MLP over the stage's width.
        layer_scale: Initial scale of what the mixers and MLPs add, None for no scale.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    output_fmt = 'NCHW'

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: tuple[int, ...] = (1, 3, 8, 4),
        dims: int | tuple[int, ...] = 80,
        stem_dim: int = 32,
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        window_size: tuple[int, ...] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        dims = stage_dims('MambaVision', dims, depths)
        for name, values in dict(num_heads=num_heads, window_size=window_size).items():
            if len(values) != len(depths):
                raise ValueError(
                    f'MambaVision: {name} must give one number for each of the {len(depths)} depths, got {values}.'
                )
        stem = Stem(in_chans, stem_dim, dims[0], **dd)
        drop_path = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages: list[Stage] = []
        for i, dim in enumerate(dims):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = nn.Conv2d(dims[i - 1], dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
            if i < _CONV_STAGES:
                stages.append(Stage(downsample, [ConvBlock(dim, drop_path=rate, **dd) for rate in drop_path[i]]))
                continue
            blocks = []
            for j, rate in enumerate(drop_path[i]):
                scans = j < math.ceil(depths[i] / 2)
                mixer = MambaVisionMixer(dim, **dd) if scans else Attention(dim, num_heads[i], **dd)
                blocks.append(Block(dim, mixer, mlp_ratio, layer_scale, drop_path=rate, **dd))
            stages.append(WindowStage(downsample, blocks, window_size[i]))
        head = NormPoolHead(dims[-1], num_classes, global_pool, drop_rate, nn.BatchNorm2d, self.output_fmt, **dd)
        super().__init__(stem, stages, head, dims, in_chans, num_classes, drop_rate)
        named_apply(init_linear, self)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of a checkpoint, whether under our names or under published ones."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


# The published names, in the order in which the rules apply.
_RENAMES = (
    (r'^patch_embed\.conv_down\.0\.', 'stem.conv1.'),
    (r'^patch_embed\.conv_down\.1\.', 'stem.norm1.'),
    (r'^patch_embed\.conv_down\.3\.', 'stem.conv2.'),
    (r'^patch_embed\.conv_down\.4\.', 'stem.norm2.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^norm\.', 'head.norm.'),
    (r'^levels\.(\d+)\.downsample\.reduction\.0\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.'),
    (r'^levels\.(\d+)\.blocks\.', r'stages.\1.blocks.'),
    (r'\.gamma_([12])$', r'.ls\1.gamma'),
    (r'\.mixer\.conv1d_([xz])\.', r'.mixer.conv_\1.'),
    (r'\.mixer\.dt_proj\.(weight|bias)$', r'.mixer.dt_\1'),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published MambaVision checkpoint to our names and shapes by `rename_checkpoint`."""
    return rename_checkpoint(state_dict, model, _RENAMES)


def constructor_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that decide names and shapes, from tensors under our names.

    Raises:
        LookupError: A tensor that tells an argument is missing, or has too few dimensions.
        ZeroDivisionError: A tensor is empty.
    """
    first = first_blocks(state_dict)
    windows = first[_CONV_STAGES:]
    mlps = [state_dict[f'{block}mlp.fc1.weight'].shape for block in windows]
    return dict(
        **pyramid_args(state_dict),
        stem_dim=state_dict['stem.conv1.weight'].shape[0],
        dims=[state_dict[f'{block}norm1.weight'].shape[0] for block in first],
        mlp_ratio=max(hidden_dim / dim for hidden_dim, dim in mlps),  # widths were rounded down
        layer_scale=1e-5 if f'{windows[0]}ls1.gamma' in state_dict else None,  # there is one, whatever it began with
    )


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'min_input_size': (3, 32, 32),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        **kwargs,
    }


def _hub(hub_id: str, filename: str, **kwargs) -> dict[str, Any]:
    weights = {'hf_hub_id': f'nvidia/MambaVision-{hub_id}', 'hf_hub_filename': f'{filename}.pth.tar'}
    return _cfg(**weights, license='cc-by-nc-sa-4.0', **kwargs)


_256: dict[str, Any] = dict(input_size=(3, 256, 256), pool_size=(8, 8))
_512: dict[str, Any] = dict(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=0.93, crop_mode='squash')

default_cfgs = generate_default_cfgs(
    {
        'mambavision_tiny.in1k': _hub('T-1K', 'mambavision_tiny_1k'),
        'mambavision_tiny2.in1k': _hub('T2-1K', 'mambavision_tiny2_1k', crop_pct=0.98),
        'mambavision_small.in1k': _hub('S-1K', 'mambavision_small_1k', crop_pct=0.93),
        'mambavision_base.in1k': _hub('B-1K', 'mambavision_base_1k'),
        'mambavision_base.in21k_ft_in1k': _hub('B-21K', 'mambavision_base_21k'),
        'mambavision_large.in1k': _hub('L-1K', 'mambavision_large_1k'),
        'mambavision_large.in21k_ft_in1k': _hub('L-21K', 'mambavision_large_21k'),
        'mambavision_large2.in1k': _hub('L2-1K', 'mambavision_large2_1k'),
        'mambavision_large2_512.in21k_ft_in1k': _hub('L2-512-21K', 'mambavision_L2_21k_240m_512', **_512),
        'mambavision_large3.in21k_ft_in1k': _hub('L3-256-21K', 'mambavision_L3_21k_740m_256', **_256),
        'mambavision_large3_512.in21k_ft_in1k': _hub('L3-512-21K', 'mambavision_L3_21k_740m_512', **_512),
        'test_mambavision': _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
    }
)


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs) -> MambaVision:
    return build_backbone(MambaVision, variant, pretrained, checkpoint_filter_fn, **kwargs)


_LARGE2 = dict(depths=(3, 3, 12, 5), dims=196, stem_dim=64, num_heads=(4, 8, 16, 32), layer_scale=1e-5)
_LARGE3 = dict(depths=(3, 3, 20, 10), dims=256, stem_dim=64, num_heads=(4, 8, 16, 32), layer_scale=1e-5)


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(depths=(1, 3, 8, 4), dims=80, stem_dim=32)
    return _create_mambavision('mambavision_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(depths=(1, 3, 11, 4), dims=80, stem_dim=32)
    return _create_mambavision('mambavision_tiny2', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(depths=(3, 3, 7, 5), dims=96, stem_dim=64)
    return _create_mambavision('mambavision_small', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(depths=(3, 3, 10, 5), dims=128, stem_dim=64, layer_scale=1e-5)
    return _create_mambavision('mambavision_base', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(depths=(3, 3, 10, 5), dims=196, stem_dim=64, num_heads=(4, 8, 16, 32), layer_scale=1e-5)
    return _create_mambavision('mambavision_large', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs) -> MambaVision:
    return _create_mambavision('mambavision_large2', pretrained, **dict(_LARGE2, **kwargs))


@register_model
def mambavision_large2_512(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(_LARGE2, window_size=(8, 8, 32, 16))
    return _create_mambavision('mambavision_large2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large3(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(_LARGE3, window_size=(8, 8, 16, 8))
    return _create_mambavision('mambavision_large3', pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large3_512(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args = dict(_LARGE3, window_size=(8, 8, 32, 16))
    return _create_mambavision('mambavision_large3_512', pretrained, **dict(model_args, **kwargs))


@register_model
def test_mambavision(pretrained: bool = False, **kwargs) -> MambaVision:
    model_args: dict[str, Any] = dict(depths=(1, 1, 3, 2), dims=(32, 48, 64, 96), stem_dim=16)
    model_args.update(num_heads=(2, 2, 2, 4), window_size=(4, 4, 4, 2), layer_scale=1e-2)
    return _create_mambavision('test_mambavision', pretrained, **dict(model_args, **kwargs))


register_aliases(
    __name__,
    {
        'mamba_vision_T': 'mambavision_tiny',
        'mamba_vision_T2': 'mambavision_tiny2',
        'mamba_vision_S': 'mambavision_small',
        'mamba_vision_B': 'mambavision_base',
        'mamba_vision_L': 'mambavision_large',
        'mamba_vision_L2': 'mambavision_large2',
        'mamba_vision_L3_256_21k': 'mambavision_large3',
    },
)
