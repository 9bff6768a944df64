# SPDX-License-Identifier: Apache-2.0
"""What the backbones share: the pyramid of stem, stages and head with the methods that timm expects of it, the reading
of published checkpoints, and the way from an entrypoint to a model.

Feature maps are channels-last, (batch, height, width, channels).
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import create_classifier, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, register_model_deprecations
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import in_groups
from .weights import pretrained_kwargs

__all__ = [
    'ALIASES',
    'Backbone',
    'NormPoolHead',
    'Stage',
    'build_backbone',
    'init_linear',
    'register_aliases',
    'rename_checkpoint',
    'stage_dims',
]


class Stage(nn.Module):
    """Downsample, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.blocks(self.downsample(x))
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        return in_groups(self.blocks, x)


class NormPoolHead(nn.Module):
    """Classifier: layer norm of every token, pooling, linear."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        pool_type: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_features = dim
        self.norm = nn.LayerNorm(dim, **dd)
        self.global_pool, self.fc = create_classifier(dim, num_classes, pool_type, input_fmt='NHWC', **dd)
        self.num_features = dim * self.global_pool.feat_mult()  # after pooling
        self.drop = nn.Dropout(drop_rate)

    def reset(self, num_classes: int, pool_type: str | None = None, device=None, dtype=None) -> None:
        if pool_type is None:
            pool_type = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.in_features, num_classes, pool_type, input_fmt='NHWC', device=device, dtype=dtype
        )
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x)
        x = self.global_pool(x)  # [B, H, W, C] -> [B, C], unless the pooling is off
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Backbone(nn.Module):
    """A pyramid of stages at 1/4, 1/8, 1/16, ... of the image's resolution, odd sizes rounded up.

    Args:
        stem: Images, (batch, in_chans, H, W), to tokens, (batch, H/4, W/4, dims[0]).
        stages: Each a map to the next one, the last of width dims[-1].
        dims: Width of each stage.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, '' for none.
        drop_rate: Dropout before the classifier.
    """

    output_fmt = 'NHWC'

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = dims[-1]
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f'stages.{i}') for i, dim in enumerate(dims)]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = NormPoolHead(dims[-1], num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'stages.*.mixer.A_log', 'stages.*.mixer.D', 'stages.*.mixer.dt_bias'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)'
            if coarse
            else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^head\.norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        weight = self.stem.conv1.weight
        self.head.reset(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' outputs along with the final feature map.

        Args:
            x: Images, (batch, in_chans, H, W).
            indices: Which stages: the last n if an int, all if None.
            norm: Apply the head's norm to the last stage's output.
            stop_early: Stop after the last stage that is asked for.
            output_fmt: Layout of the intermediates, 'NCHW' or 'NHWC'.
            intermediates_only: Return the intermediates alone.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        intermediates = []

        x = self.forward_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a Sequential
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediate = self.head.norm(x) if norm and i == last_index else x
                if output_fmt == 'NCHW':
                    intermediate = intermediate.permute(0, 3, 1, 2).contiguous()  # [B, H, W, C] -> [B, C, H, W]
                intermediates.append(intermediate)

        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need, and return the kept indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if pruned:  # the head was sized for the last stage's width
            self.num_features = self.feature_info[max_index]['num_chs']
            self.head.in_features = self.num_features
        if prune_norm or pruned:
            self.head.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images, (batch, in_chans, H, W) -> tokens, (batch, H/4, W/4, C)."""
        return self.stem(x) if torch.jit.is_scripting() else in_groups(self.stem, x, growth=8)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images, (batch, in_chans, H, W) -> feature map before the head, (batch, H/32, W/32, C)."""
        return self.stages(self.forward_stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def stage_dims(name: str, dims: int | Sequence[int], depths: Sequence[int]) -> tuple[int, ...]:
    """One width per stage, from those or from the first one's, which then doubles at every stage."""
    if isinstance(dims, int):
        return tuple(dims * 2**i for i in range(len(depths)))
    if len(dims) != len(depths):
        raise ValueError(f'{name}: dims must give one width for each of the {len(depths)} depths, got {dims}.')
    return tuple(dims)


def init_linear(module: nn.Module, name: str) -> None:
    """For `named_apply`: linear layers from a truncated normal; all else, x_proj too, as its constructor made it."""
    if isinstance(module, nn.Linear) and not name.endswith('x_proj'):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# The mixers' part of the published names; every family begins with its own.
_MIXER_RENAMES = (
    (r'\.(op|self_attention)\.', '.mixer.'),
    (r'\.mixer\.conv2d\.', '.mixer.conv.'),
    (r'\.mixer\.out_norm\.', '.mixer.norm.'),
    (r'\.mixer\.x_proj_weight$', '.mixer.x_proj.weight'),
    (r'\.mixer\.dt_projs(_|\.)weight$', '.mixer.dt_weight'),
    (r'\.mixer\.dt_projs(_|\.)bias$', '.mixer.dt_bias'),
    (r'\.mixer\.A_logs$', '.mixer.A_log'),
    (r'\.mixer\.Ds$', '.mixer.D'),
)


def rename_checkpoint(
    state_dict: dict[str, Any],
    model: nn.Module,
    renames: Sequence[tuple[str, str | Callable[[re.Match], str]]],
) -> dict[str, Tensor]:
    """Bring a published checkpoint to our names and shapes; the model's own names and tensors pass unchanged.

    Names that no rule knows, or that would become a name that is there already, are kept as they are, so that a strict
    load reports them.

    Args:
        state_dict: Names and tensors, or what wraps them: state_dict_ema, model_ema, state_dict or model.
        model: The network that the tensors are for.
        renames: Patterns and replacements of the family, applied in order before those of the mixers.

    Raises:
        ValueError: A tensor of the scan has another number of elements than the model's.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # averaged weights first, as timm takes them
        if wrapper in state_dict:
            state_dict = state_dict[wrapper]
            break

    own = model.state_dict()
    if state_dict.keys() <= own.keys():
        return state_dict
    out = OrderedDict()
    if hasattr(state_dict, '_metadata'):  # the modules' versions, which loading reads
        out._metadata = state_dict._metadata
    for name, value in state_dict.items():
        ours = name
        if name not in own:
            for pattern, replacement in (*renames, *_MIXER_RENAMES):
                ours = re.sub(pattern, replacement, ours)
            if ours in out or ours in state_dict:
                ours = name
        # The scan's parameters are stacked over the orders, published in one layout or another of the same numbers.
        if ours != name and ours in own and re.search(r'\.mixer\.(x_proj\.weight|dt_weight|dt_bias|A_log|D)$', ours):
            if value.numel() != own[ours].numel():
                raise ValueError(
                    f'checkpoint: {name} must hold {own[ours].numel()} numbers for {ours} of shape '
                    f'{tuple(own[ours].shape)}, got {tuple(value.shape)}.'
                )
            value = value.reshape(own[ours].shape)
        out[ours] = value
    return out


def build_backbone(
    cls: type[Backbone],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Tensor]],
    output_stride: int = 32,
    **kwargs,
) -> Backbone:
    """The model of an entrypoint, through timm's builder.

    Raises:
        ValueError: output_stride is not 32; a scan has no dilated form that would keep the resolution.
        RuntimeError: There are no pretrained weights, see `pretrained_kwargs`.
    """
    if output_stride != 32:
        raise ValueError(f'{variant}: output_stride must be 32, the only one of its stages, got {output_stride!r}.')
    if pretrained:
        kwargs = pretrained_kwargs(variant, kwargs)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **kwargs,
    )


ALIASES: dict[str, str] = {}  # further names of registered models


def register_aliases(module: str, aliases: dict[str, str]) -> None:
    """Let `timm.create_model` take further names, such as those of the papers' code, for registered models.

    timm keeps a name out of its listings only as a deprecated one. An alias is not, so its warning is silenced.

    Args:
        module: Name of the file's module, which holds the entrypoints.
        aliases: Further names and the models' own.
    """
    ALIASES.update(aliases)
    for alias in aliases:
        warnings.filterwarnings('ignore', f'Mapping deprecated model name {re.escape(alias)} ')
    register_model_deprecations(module, aliases)
