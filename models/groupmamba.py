# SPDX-License-Identifier: Apache-2.0
"""GroupMamba: the channels in four groups, each scanned in an order of its own; a class attention in the head.

Paper: `GroupMamba: Efficient Group-Based Visual State Space Model` (CVPR 2025) - https://arxiv.org/abs/2407.13772

Feature maps are channels-last, (batch, height, width, channels), from the stem's last norm to the head.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, named_apply, register_model, register_notrace_module
from torch import Tensor, nn

from .backbone import Backbone, NormPoolHead, Stage, build_backbone, init_linear, stage_dims
from .layers import Linear, Mlp, in_groups
from .vmamba import SS2D, Conv3x3s2
from .weights.identify import first_blocks, pyramid_args
from .weights.rename import rename_checkpoint

__all__ = ['GroupMamba']

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # between the layers; within them the norms have PyTorch's 1e-5


class Stem(nn.Module):
    """Image to tokens at a quarter of its resolution: three convolutions with batch norms, one with a layer norm."""

    def __init__(self, in_chans: int, stem_dim: int, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, stem_dim, kernel_size=7, stride=2, padding=3, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(stem_dim, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, kernel_size=3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(stem_dim, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, kernel_size=3, padding=1, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(stem_dim, **dd)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(stem_dim, dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm4 = nn.LayerNorm(dim, **dd)

    @in_groups(growth=8)
    def forward(self, x: Tensor) -> Tensor:
        # Channels last in memory, so that what follows is too, and the last permute a view. Not by memory_format, which
        # vmap does not know.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.act1(self.norm1(self.conv1(x)))  # [B, C, H, W] -> [B, C', H/2, W/2]
        x = self.act2(self.norm2(self.conv2(x)))
        x = self.act3(self.norm3(self.conv3(x)))
        return self.norm4(self.conv4(x).permute(0, 2, 3, 1))  # -> [B, H/4, W/4, C'']


class ChannelAffinity(nn.Module):
    """A gain of each channel, between 0 and 1, by the means of all over the map: [B, H, W, C] -> [B, 1, 1, C]."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        hidden_dim = max(dim // 16, 1)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((1, 2), keepdim=True)
        return self.gate(self.fc2(self.act(self.fc1(x))))


@register_notrace_module  # a node of timm's FX graphs, so that its shortcuts are taken there
class GroupMixer(nn.Module):
    """The paper's modulated group Mamba layer: four mixers of a quarter of the channels and one order each.

    Their result multiplies what they were made of, and the channels' affinity weights it. One norm serves at both ends.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        group_args: dict[str, Any] = dict(scan_ndim=1, gate=True, **dd)
        self.group0 = SS2D(dim // 4, orders=[0], **group_args)
        self.group1 = SS2D(dim // 4, orders=[1], **group_args)
        self.group2 = SS2D(dim // 4, orders=[2], **group_args)
        self.group3 = SS2D(dim // 4, orders=[3], **group_args)
        self.skip_scale = nn.Parameter(torch.ones(1, **dd))
        self.affinity = ChannelAffinity(dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x0, x1, x2, x3 = x.chunk(4, dim=-1)  # [B, H, W, C] -> four [B, H, W, C/4]
        y = torch.cat([self.group0(x0), self.group1(x1), self.group2(x2), self.group3(x3)], dim=-1)
        y = y * x * (self.skip_scale * self.affinity(x))
        return self.proj(self.norm(y))


class ConvMlp(nn.Module):
    """PVT's MLP of the second version, with a depthwise convolution before its activation."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim, **dd)

    @in_groups(growth=8, while_training=True)
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # [B, H, W, C] -> [B, H, W, C']
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class Block(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.mixer = GroupMixer(dim, **dd)  # which begins with a norm
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mixer(x))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """A block for what the pooling gives, [..., C]: every vector by itself, as a map of one position."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.mixer = GroupMixer(dim, **dd)
        self.norm1 = LayerNorm(dim, **dd)  # of the mixer's result
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.reshape(-1, 1, 1, x.shape[-1])
        x = x + self.norm1(self.mixer(maps)).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class DistilledHead(NormPoolHead):
    """Classifier: pooling, class attention, norm, and two linear layers, one for labels and one for a teacher's.

    Its scores are the mean of the two; in distilled training they come as a pair. Without pooling there is no class
    attention, and the map is normed.

    Args:
        dim: Width of the feature map.
        num_classes: Number of classes; 0 leaves the pooled features.
        pool_type: Pooling by timm's name, '' for none.
        drop_rate: Dropout before the classifiers.
        mlp_ratio: Hidden width of the class attention's MLP over the map's width.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        pool_type: str = 'avg',
        drop_rate: float = 0.0,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_classes, pool_type, drop_rate, norm_layer=LayerNorm, **dd)
        self.attn: nn.Module = ClassAttention(dim, mlp_ratio=mlp_ratio, **dd)
        self.fc_dist = self._second_classifier(num_classes, **dd)
        self.pools = bool(pool_type)
        self.distilled_training = False

    def _second_classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, device=None, dtype=None) -> None:
        super().reset(num_classes, pool_type, device=device, dtype=dtype)
        self.pools = not self.global_pool.is_identity()
        self.fc_dist = self._second_classifier(num_classes, device=device, dtype=dtype)
        self.fc_dist.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.pools:
            x = x.unflatten(-1, (-1, self.in_features))  # [B, C or 2C] -> [B, 1 or 2, C]
            x = self.norm(self.attn(x)).flatten(1)
        else:
            x = self.norm(x)
        x = self.drop(x)
        if pre_logits:
            return x
        scores, scores_dist = self.fc(x), self.fc_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return cast(Tensor, (scores, scores_dist))  # one kind of result is all that TorchScript knows
        return (scores + scores_dist) / 2


class GroupMamba(Backbone):
    """GroupMamba.

    Takes images of any size from 32x32 up, (batch, in_chans, H, W). A stage works at 1/4, 1/8, 1/16, 1/32 of the
    resolution, odd sizes rounded up. The paper gives no initialisation; this one is VMamba's.

    Args:
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, '' for none.
        stem_dim: Width of the stem, whose last layer has the first stage's.
        depths: Number of blocks of each stage.
        dims: Width of each stage, or the first one's, which then doubles at every stage; multiples of 4.
        mlp_ratio: Hidden width of each stage's MLPs over the stage's width, or one for all; the head has the last one.
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        stem_dim: int = 32,
        depths: tuple[int, ...] = (3, 4, 9, 3),
        dims: int | tuple[int, ...] = (64, 128, 348, 448),
        mlp_ratio: float | tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        dims = stage_dims('GroupMamba', dims, depths)
        if any(dim % 4 for dim in dims):
            raise ValueError(f'GroupMamba: dims must be multiples of 4, the number of groups, got {dims}.')
        ratios = mlp_ratio if isinstance(mlp_ratio, Sequence) else [mlp_ratio] * len(depths)
        if len(ratios) != len(depths):
            raise ValueError(
                f'GroupMamba: mlp_ratio must give one ratio for each of the {len(depths)} depths, got {mlp_ratio}.'
            )
        stem = Stem(in_chans, stem_dim, dims[0], **dd)
        drop_path = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, dim in enumerate(dims):
            downsample = Conv3x3s2(dims[i - 1], dim, **dd) if i > 0 else nn.Identity()
            blocks = [Block(dim, mlp_ratio=ratios[i], drop_path=rate, **dd) for rate in drop_path[i]]
            norm = LayerNorm(dim, **dd) if i < len(dims) - 1 else None  # the last stage's is the head's
            stages.append(Stage(downsample, blocks, norm))
        head = DistilledHead(dims[-1], num_classes, global_pool, drop_rate, mlp_ratio=ratios[-1], **dd)
        super().__init__(stem, stages, head, dims, in_chans, num_classes, drop_rate)
        named_apply(init_linear, self)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether the scores of training are a pair, those for the labels and those for a teacher's."""
        cast(DistilledHead, self.head).distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]  # as timm's distilled networks
        head = cast(DistilledHead, self.head)
        return head.fc, head.fc_dist

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need, and return the kept indices."""
        depth = len(self.stages)
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < depth:
            self.head.attn = nn.Identity()
        return take_indices

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of a checkpoint, whether under our names or under published ones."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


# The published names, in the order in which the rules apply. Stages are counted from 1, and layers, activations among
# them, from 0.
_RENAMES = (
    (r'^patch_embed1\.conv\.([036])\.', lambda m: f'stem.conv{int(m[1]) // 3 + 1}.'),
    (r'^patch_embed1\.conv\.([147])\.', lambda m: f'stem.norm{int(m[1]) // 3 + 1}.'),
    (r'^patch_embed1\.proj\.', 'stem.conv4.'),
    (r'^patch_embed1\.norm\.', 'stem.norm4.'),
    (r'^patch_embed(\d+)\.proj\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.conv.'),
    (r'^patch_embed(\d+)\.norm\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.norm.'),
    (r'^block(\d+)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.'),
    (r'^norm([123])\.', lambda m: f'stages.{int(m[1]) - 1}.norm.'),
    (r'^norm4\.', 'head.norm.'),
    (r'^post_network\.0\.', 'head.attn.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^dist_head\.', 'head.fc_dist.'),
    (r'\.dwconv\.dwconv\.', '.conv.'),
    (r'\.attn\.(fc[12])\.', r'.mixer.affinity.\1.'),
    (r'\.attn\.mamba_g(\d)\.', lambda m: f'.mixer.group{int(m[1]) - 1}.'),
    (r'\.attn\.(norm|proj|skip_scale)\b', r'.mixer.\1'),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published GroupMamba checkpoint to our names and shapes by `rename_checkpoint`."""
    return rename_checkpoint(state_dict, model, _RENAMES)


def constructor_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that decide names and shapes, from tensors under our names.

    Raises:
        LookupError: A tensor that tells an argument is missing, or has too few dimensions.
        ZeroDivisionError: A tensor is empty.
    """
    mlps = [state_dict[f'{block}mlp.fc1.weight'].shape for block in first_blocks(state_dict)]
    return dict(
        **pyramid_args(state_dict),
        stem_dim=state_dict['stem.conv1.weight'].shape[0],
        dims=[dim for _, dim in mlps],
        mlp_ratio=[hidden_dim / dim for hidden_dim, dim in mlps],
    )


def _cfg(hf_hub_id: str | None = None, drive_id: str = '', **kwargs) -> dict[str, Any]:
    return {
        'url': '',
        'hf_hub_id': hf_hub_id,
        'origin_url': f'https://drive.google.com/uc?id={drive_id}' if drive_id else None,  # of the same weights
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'min_input_size': (3, 32, 32),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': ('head.fc', 'head.fc_dist'),
        'license': 'mit' if hf_hub_id else 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'groupmamba_tiny.in1k': _cfg('Abdelrahman-shaker/GroupMamba-Tiny', '1TrYYs0uGZbja_2ONQLyfiNdp8C5ZYP1o'),
        'groupmamba_small.in1k': _cfg('Abdelrahman-shaker/GroupMamba-Small', '1vTN9ynDcsDuOVrcT9GcQ5nBSk-hXySlh'),
        'groupmamba_base.in1k': _cfg('Abdelrahman-shaker/GroupMamba-Base', '1A_srBeDYpsinU5W3PAEADu1saoz413EU'),
        'test_groupmamba': _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
    }
)


def _create_groupmamba(variant: str, pretrained: bool = False, **kwargs) -> GroupMamba:
    return build_backbone(GroupMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs) -> GroupMamba:
    model_args = dict(stem_dim=32, depths=(3, 4, 9, 3), dims=(64, 128, 348, 448))
    return _create_groupmamba('groupmamba_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs) -> GroupMamba:
    model_args = dict(stem_dim=64, depths=(3, 4, 16, 3), dims=(64, 128, 348, 512))
    return _create_groupmamba('groupmamba_small', pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs) -> GroupMamba:
    model_args = dict(stem_dim=64, depths=(3, 6, 21, 3), dims=(96, 192, 424, 512))
    return _create_groupmamba('groupmamba_base', pretrained, **dict(model_args, **kwargs))


@register_model
def test_groupmamba(pretrained: bool = False, **kwargs) -> GroupMamba:
    model_args = dict(stem_dim=16, depths=(1, 1, 2, 1), dims=(32, 48, 64, 96), mlp_ratio=4.0)
    return _create_groupmamba('test_groupmamba', pretrained, **dict(model_args, **kwargs))
