# SPDX-License-Identifier: Apache-2.0
"""timm models as backbones of mmdetection and mmsegmentation."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn

from ..files import printable
from ..weights import adapt_input, list_models, misfits, rename_fn, strip_prefixes
from .sources import log_changes, naming, read_weights
from .utils import check_init, init_file

__all__ = ['Float32RoIExtractor', 'TimmFeatures', 'take_other_names']


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """A timm model as the backbone of a detector or segmentor: one map per level, (batch, C, H, W).

    Weights are read by `init_weights`, which a training calls and a test does not. Of a classifier, a detector, a
    segmentor or a backbone alone, under published names or ours, it takes what belongs to this backbone.

    Args:
        model_name: Name for `timm.create_model`.
        out_indices: Indices of the levels, in the order of the maps.
        out_norm: Whether each level has a layer norm over its channels, `outnorm{i}` as in the published detectors.
        frozen_stages: Number of stages that keep their weights and statistics, as the stem then does; 0 for the stem
            alone, -1 for none. Where a model has no `stages`, they are the groups of its `group_matcher()`.
        norm_eval: Whether batch norms keep their statistics.
        with_cp: Whether gradient checkpointing is on.
        reductions: Resolutions of the image over those of the levels that neck and heads count on; None for any.
        pretrained: Whether to start from timm's pretrained weights.
        init_cfg: Config of a file to start from, dict(type='Pretrained', checkpoint=FILE), see `local_file`.
        model_args: Further keyword arguments of `timm.create_model`, such as drop_path_rate.

    Raises:
        ValueError: An argument has another form.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        reductions: Sequence[int] | None = None,
        pretrained: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
        check_init(type(self).__name__, pretrained, init_cfg)
        self._create = functools.partial(timm.create_model, model_name, **model_args)
        self._out_indices = tuple(out_indices)
        self.model = self._features()
        self.architecture: str = self.model.pretrained_cfg['architecture']  # even if model_name is an alias
        self.pretrained = pretrained
        self.norm_eval = norm_eval
        count = len(self.model.feature_info.info)
        self.levels = tuple(i % count for i in self.model.out_indices)  # which may count from the end
        if len(set(self.levels)) < len(self.levels):
            raise ValueError(f'TimmFeatures: out_indices must name each level once, got {self._out_indices}.')
        got = self.model.feature_info.reduction()
        if reductions is not None and list(reductions) != got:
            raise ValueError(
                f'TimmFeatures: model_name must be a network whose stages reduce the image by {list(reductions)}, got '
                f'{self.architecture}, whose stages reduce it by {got}.'
            )
        self.out_norm = out_norm
        if out_norm:
            for level, channels in zip(self.levels, self.model.feature_info.channels(), strict=True):
                self.add_module(f'outnorm{level}', LayerNorm2d(channels, eps=1e-5))
        self.frozen_stages = frozen_stages
        for parameter in self._frozen():
            parameter.requires_grad_(False)
        self.model.model.set_grad_checkpointing(with_cp)
        self.register_load_state_dict_pre_hook(take_other_names)

    def _features(self, pretrained: bool = False) -> Any:
        # timm's getter gives (batch, C, H, W) for every model, and keeps the names of its tensors.
        return self._create(
            pretrained=pretrained, features_only=True, feature_cls='getter', out_indices=self._out_indices
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images, (batch, in_chans, H, W) -> a map per level, (batch, C, H/4, W/4), (batch, C', H/8, W/8) and so on."""
        maps = dict(zip(sorted(self.levels), self.model(x), strict=True))  # timm gives them in the network's order
        features = [maps[i] for i in self.levels]
        norms = [getattr(self, f'outnorm{i}') for i in self.levels] if self.out_norm else []
        if norms:
            features = [norm(f) for norm, f in zip(norms, features, strict=True)]
        if self.training:
            # A neck may leave out levels, as start_level=1 does, and DistributedDataParallel stops where a parameter
            # gets no gradient. So each map also depends, by empty sums with gradients of zeros, on the deepest map, to
            # which all stages lead, and on all norms.
            parts = [maps[max(self.levels)], *(p for norm in norms for p in norm.parameters())]
            nothing = sum(part[:0].sum() for part in parts)
            features = [f + nothing for f in features]
        return tuple(f.contiguous() for f in features)  # the compiled operators of mmcv take no other layout

    def train(self, mode: bool = True) -> 'TimmFeatures':
        super().train(mode)
        if frozen := self._frozen():
            for module in self.model.modules():
                own = set(module.parameters())
                if own and own <= frozen:  # a block with its drop path, a batch norm with its statistics
                    module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _frozen(self) -> set[nn.Parameter]:
        """The parameters of the stem and of the stages that are not trained."""
        if self.frozen_stages == -1:
            return set()
        groups = _stages(self.model.model)
        if self.frozen_stages not in range(len(groups)):
            limit = f', or 0 to {len(groups) - 1}' if groups else ', without stages and group_matcher()'
            raise ValueError(
                f'TimmFeatures: frozen_stages must be -1{limit} for {self.architecture}, got {self.frozen_stages!r}.'
            )
        return {parameter for group in groups[: self.frozen_stages + 1] for parameter in group}

    def init_weights(self) -> None:
        """Read the weights that `pretrained` or `init_cfg` ask for; timm models initialise themselves otherwise.

        Raises:
            FileNotFoundError: There is no such file.
            RuntimeError: timm has no pretrained weights, or no way to them from here.
            ValueError: The file cannot be read safely, or does not fit.
        """
        if self.pretrained:
            self.model.load_state_dict(self._features(pretrained=True).state_dict())
        elif self.init_cfg is not None:
            self._load(init_file(self.init_cfg))

    def _load(self, path: str | Path) -> None:
        tensors, metadata = read_weights(path)
        if metadata.get('model', self.architecture) != self.architecture:
            raise ValueError(f'checkpoint {path} must hold {self.architecture}, got {printable(metadata["model"])}.')
        with naming(path):
            tensors = dict(self.rename(strip_prefixes(tensors)[0]))
        log_changes(path, adapt_input(tensors, self.model.model), (), {}, {})
        own = {name.removeprefix(_INNER): value for name, value in self.state_dict().items()}
        with torch.device('meta'):
            whole: Any = self._create()
        # Tensors that are no misfits: those of the head, of stages after the last level, of norms of other levels.
        elsewhere = set(whole.state_dict())
        if self.out_norm:
            levels = range(len(whole.feature_info))
            elsewhere.update(f'outnorm{i}.{kind}' for i in levels for kind in ('weight', 'bias'))
        tensors = {name: value for name, value in tensors.items() if name in own or name not in elsewhere}
        if not any(name.startswith('outnorm') for name in tensors):  # a classifier has none, and they begin anew
            own = {name: value for name, value in own.items() if not name.startswith('outnorm')}
        problems = misfits(tensors, own)
        if problems:
            raise ValueError(
                f'checkpoint {path} must hold the {len(own)} tensors of the backbone {self.architecture}, got '
                f'{len(tensors)}: {problems}.'
            )
        for name, value in tensors.items():
            own[name].copy_(value)

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under timm's names, from published names of this backbone; all other names stay as they are."""
        if self.architecture not in list_models():
            return state_dict
        return rename_fn(self.architecture)(state_dict, self.model.model)


def _stages(network: Any) -> list[list[nn.Parameter]]:
    """The parameters of the stem, and of each stage after it."""
    if hasattr(network, 'stem') and hasattr(network, 'stages'):
        return [list(part.parameters()) for part in (network.stem, *network.stages)]
    if getattr(network, 'group_matcher', None) is None:
        return []
    groups = group_parameters(network, network.group_matcher(coarse=True), return_values=True)
    return [groups[i] for i in sorted(groups)]


_INNER = 'model.model.'  # the prefix of the network in a TimmFeatures, below timm's getter


def take_other_names(
    backbone: TimmFeatures, state_dict: dict[str, Tensor], prefix: str, *args: Any, adapt: bool = False, **kwargs: Any
) -> str:
    """Change the names of a backbone to ours, in place, so that a published detector loads as a whole.

    Args:
        backbone: The backbone.
        state_dict: Names and tensors of the detector.
        prefix: Prefix of the names of the backbone.
        args: Further arguments of PyTorch's hooks.
        adapt: Whether weights for images of three channels are fitted to those of the backbone.
        kwargs: Further arguments of PyTorch's hooks.

    Returns:
        What was fitted, in words; '' if nothing was.
    """
    tensors = {}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        tensors[name.removeprefix(prefix).removeprefix(_INNER)] = state_dict.pop(name)
    tensors = dict(backbone.rename(tensors))
    fitted = adapt_input(tensors, backbone.model.model) if adapt else ''
    for name, value in tensors.items():
        state_dict[f'{prefix}{"" if name.startswith("outnorm") else _INNER}{name}'] = value
    return fitted


@MODELS.register_module()
class Float32RoIExtractor(nn.Module):
    """mmdetection's SingleRoIExtractor on float32 maps, as it rounds the boxes to the dtype of the maps.

    bfloat16 has eight bits: it has no coordinate between 512 and 516.

    Args:
        kwargs: Keyword arguments of SingleRoIExtractor.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.extractor = MODELS.build(dict(type='mmdet.SingleRoIExtractor', **kwargs))
        self.num_inputs = self.extractor.num_inputs

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Maps, (batch, C, H, W) each, and boxes, (regions, 5) -> (regions, C, size, size)."""
        with torch.autocast(rois.device.type, enabled=False):
            return self.extractor([f.float() for f in feats], rois.float(), roi_scale_factor)
