# SPDX-License-Identifier: Apache-2.0
"""What the backbones share: the pyramid of stem, stages and head with the methods that timm expects of it, and the way
from an entrypoint to a model.

Feature maps are channels-last, (batch, height, width, channels), but for networks whose `output_fmt` is 'NCHW'.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from timm.layers import create_classifier, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, register_model_deprecations
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Blocks
from .weights import pretrained_kwargs

__all__ = [
    'ALIASES',
    'Backbone',
    'NormPoolHead',
    'Stage',
    'build_backbone',
    'init_linear',
    'register_aliases',
    'stage_dims',
]


class Stage(nn.Module):
    """Downsample, blocks, and a norm where the network has one.

    Args:
        downsample: Map to this stage's resolution and width.
        blocks: Blocks of this width.
        norm: Norm of what the blocks give, which the next stage takes, too.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = Blocks(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(self.downsample(x)))

    def mix(self, x: Tensor) -> Tensor:
        """The blocks, one after the other."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class NormPoolHead(nn.Module):
    """Classifier: norm, pooling, linear.

    Args:
        dim: Width of the feature map.
        num_classes: Number of classes; 0 leaves the pooled features.
        pool_type: Pooling by timm's name, '' for none.
        drop_rate: Dropout before the classifier.
        norm_layer: Constructor of the norm.
        input_fmt: Layout of the feature map, 'NHWC' or 'NCHW'.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        pool_type: str = 'avg',
        drop_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        input_fmt: str = 'NHWC',
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_features = dim
        self.input_fmt = input_fmt
        self.norm: nn.Module = norm_layer(dim, **dd)
        self.global_pool, self.fc = create_classifier(dim, num_classes, pool_type, input_fmt=input_fmt, **dd)
        self.num_features = dim * self.global_pool.feat_mult()  # after pooling
        self.drop = nn.Dropout(drop_rate)

    def reset(self, num_classes: int, pool_type: str | None = None, device=None, dtype=None) -> None:
        if pool_type is None:
            pool_type = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.in_features, num_classes, pool_type, input_fmt=self.input_fmt, device=device, dtype=dtype
        )
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x)
        x = self.global_pool(x)  # a map -> [B, C], unless the pooling is off
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Backbone(nn.Module):
    """A pyramid of stages at 1/4, 1/8, 1/16, ... of the image's resolution, odd sizes rounded up.

    Args:
        stem: Images, (batch, in_chans, H, W), to a map of width dims[0] at a quarter of their resolution.
        stages: Stages, which map to a width and resolution each.
        head: What makes scores of the last stage's map; its layout is the network's `output_fmt`.
        dims: Width of each stage.
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        drop_rate: Dropout before the classifier.
    """

    output_fmt = 'NHWC'

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        head: NormPoolHead,
        dims: Sequence[int],
        in_chans: int,
        num_classes: int,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = dims[-1]
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f'stages.{i}') for i, dim in enumerate(dims)]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = head
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'*.A_log', '*.D', '*.dt_bias'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)'
            if coarse
            else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', (99999,)),
                (r'^head\.(?!fc)', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        weight = next(self.stem.parameters())
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
            indices: Indices of the stages whose outputs are wanted, or the number of last stages; None for all.
            norm: Whether the head's norm is applied to the last stage's output.
            stop_early: Whether the stages after the last that is asked for are left out.
            output_fmt: Layout of the intermediates, 'NCHW' or 'NHWC'.
            intermediates_only: Whether the intermediates are returned alone.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        intermediates = []

        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in take_indices:
                intermediate = self.head.norm(x) if norm and i == last_index else x
                if output_fmt != self.output_fmt:
                    order = (0, 3, 1, 2) if output_fmt == 'NCHW' else (0, 2, 3, 1)
                    intermediate = intermediate.permute(order).contiguous()
                intermediates.append(intermediate)
            if stop_early and i == max_index:
                break

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
        self.stages = nn.Sequential(*list(self.stages)[: max_index + 1])
        if pruned:  # the head was sized for the last stage's width
            self.num_features = self.feature_info[max_index]['num_chs']
            self.head.in_features = self.num_features
        if prune_norm or pruned:
            self.head.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images, (batch, in_chans, H, W) -> map at a quarter of their resolution."""
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images, (batch, in_chans, H, W) -> feature map before the head, at 1/32 of their resolution."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def stage_dims(name: str, dims: int | Sequence[int], depths: Sequence[int]) -> tuple[int, ...]:
    """The width of each stage: dims itself or, of one number, that of the first stage, doubled at every further one.

    Args:
        name: Name of the network, for the message of an error.
        dims: Width of each stage, or of the first.
        depths: Number of blocks of each stage.

    Raises:
        ValueError: dims and depths differ in length.
    """
    if isinstance(dims, int):
        return tuple(dims * 2**i for i in range(len(depths)))
    if len(dims) != len(depths):
        raise ValueError(f'{name}: dims must give one width for each of the {len(depths)} depths, got {dims}.')
    return tuple(dims)


def init_linear(module: nn.Module, name: str) -> None:
    """Initialise the linear layers from a truncated normal, for `named_apply`.

    All other modules, and x_proj, stay as their constructors made them.
    """
    if isinstance(module, nn.Linear) and not module.weight.is_meta and not name.endswith('x_proj'):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


Network = TypeVar('Network', bound=nn.Module)


def build_backbone(
    cls: type[Network],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Tensor]],
    output_stride: int | None = None,
    reduction: int = 32,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    **kwargs,
) -> Network:
    """The model of an entrypoint, through timm's builder.

    Args:
        cls: Class of the network.
        variant: Name of the model, which is its entrypoint's.
        pretrained: Whether to load the published weights.
        filter_fn: Function that brings a published checkpoint, for a network, to our names and shapes.
        output_stride: Resolution of the image over that of the last feature map, as the user asks for it.
        reduction: The only such ratio that the network has.
        out_indices: Indices of the feature maps of features_only, or the number of last ones, unless the user says.
        kwargs: Further arguments of the network, and of timm's builder.

    Raises:
        ValueError: output_stride is not that of the network; a scan has no dilated form that would keep resolution.
        RuntimeError: There are no pretrained weights, see `pretrained_kwargs`.
    """
    if output_stride not in (None, reduction):
        raise ValueError(
            f'{variant}: output_stride must be {reduction}, the only one of its stages, got {output_stride!r}.'
        )
    if pretrained:
        kwargs = pretrained_kwargs(variant, kwargs)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


ALIASES: dict[str, str] = {}  # the models' own names, by their further names


def register_aliases(module: str, aliases: dict[str, str]) -> None:
    """Let `timm.create_model` take further names, such as those of the papers' code, for registered models.

    timm keeps a name out of its listings only as a deprecated one. An alias is not, so its warning is silenced.

    Args:
        module: Name of the Python module that holds the entrypoints.
        aliases: Mapping of further names to the models' own.
    """
    ALIASES.update(aliases)
    for alias in aliases:
        warnings.filterwarnings('ignore', f'Mapping deprecated model name {re.escape(alias)} ')
    register_model_deprecations(module, {**aliases})
