# SPDX-License-Identifier: Apache-2.0
"""timm's optimizers, what decays and how fast each layer learns; bfloat16; and averages of a whole state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from .utils import unwrap

__all__ = ['BFloat16OptimWrapper', 'StateAverage', 'TimmOptimWrapperConstructor']


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Computes forward passes in bfloat16 by autocast, on a CPU as on a GPU.

    Unlike float16, bfloat16 has the range of float32, so that no loss needs scaling.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = self.optimizer.param_groups[0]['params'][0].device
        with super().optim_context(model), torch.autocast(device.type, torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """An optimizer of timm's, by `optimizer=dict(type=NAME, lr=..., weight_decay=..., layer_decay=..., ...)`.

    With layer_decay, the rate of the last group of layers of a timm model, as its `group_matcher()` tells them, is lr,
    and that of each group before it is layer_decay times that of the next.

    Args:
        optim_wrapper_cfg: Config of the optimizer and its wrapper.
        paramwise_cfg: What has no weight decay. None is timm's rule: vectors, biases, and what a `no_weight_decay()`
            names, be it the model's own or that of a timm model inside. dict(no_decay=PATTERNS) names others in place
            of the latter, by patterns as of a shell; dict(no_decay=PATTERNS, vectors_decay=True) exempts these alone.

    Raises:
        ValueError: An argument has another form.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        rule: dict[str, Any] = dict(no_decay=None) if paramwise_cfg is None else paramwise_cfg
        if not {'no_decay'} <= rule.keys() <= {'no_decay', 'vectors_decay'} or isinstance(rule['no_decay'], str):
            raise ValueError(
                "TimmOptimWrapperConstructor: paramwise_cfg must be None for timm's rule, or dict(no_decay=PATTERNS, "
                f'vectors_decay=False), got {paramwise_cfg}.'
            )
        self.optim_wrapper_cfg = optim_wrapper_cfg
        self.no_decay: Sequence[str] | None = rule['no_decay']
        self.vectors_decay: bool = rule.get('vectors_decay', False)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        cfg = dict(self.optim_wrapper_cfg)
        optimizer_cfg = dict(cfg.pop('optimizer'))
        weight_decay = optimizer_cfg.pop('weight_decay', 0.0)
        layer_decay = optimizer_cfg.pop('layer_decay', None)
        model = unwrap(model)
        groups = param_groups_weight_decay(
            model,
            weight_decay,
            weight_decay_exclude_1d=not self.vectors_decay,
            no_weight_decay_list=self._no_weight_decay(model),
        )
        if layer_decay is not None:
            if 'lr' not in optimizer_cfg:
                raise ValueError('TimmOptimWrapperConstructor: layer_decay needs optimizer.lr, got none.')
            # timm's own schedulers would apply these scales; mmengine's do not know them.
            scales = _layer_scales(model, layer_decay)
            groups = [
                dict(group, params=[p for p in group['params'] if scales.get(p, 1.0) == scale], lr=scale)
                for group in groups
                for scale in sorted({scales.get(p, 1.0) for p in group['params']})
            ]
            for group in groups:
                group['lr'] *= optimizer_cfg['lr']
        optimizer = create_optimizer_v2(groups, opt=optimizer_cfg.pop('type'), **optimizer_cfg)
        return OPTIM_WRAPPERS.build(cfg, default_args=dict(type='OptimWrapper', optimizer=optimizer))

    def _no_weight_decay(self, model: nn.Module) -> set[str]:
        """Patterns of the full names of what has no decay, whatever its form."""
        if self.no_decay is not None:
            return set(self.no_decay)
        patterns: set[str] = set()
        for prefix, module in model.named_modules():
            names: set[str] = getattr(module, 'no_weight_decay', set)()
            patterns |= {f'{prefix}.{name}' if prefix else name for name in names}
        return patterns


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """The factor of the learning rate of each parameter of the timm models inside."""
    scales = {}
    for network in model.modules():
        group_matcher = getattr(network, 'group_matcher', None)
        if group_matcher is not None:
            layers = group_parameters(network, group_matcher(coarse=False), reverse=True)
            last = max(layers.values())
            for name, parameter in network.named_parameters():
                scales[parameter] = layer_decay ** (last - layers[name])
    if not scales:
        raise ValueError('TimmOptimWrapperConstructor: layer_decay needs a timm model with group_matcher, got none.')
    return scales


@MODELS.register_module()
class StateAverage(ExponentialMovingAverage):
    """The moving average of all numbers of a state, the statistics of batch norms too, as of timm's ModelEma.

    mmengine's averages copy the statistics unless they are told otherwise. But those of the model's last weights do not
    fit its averaged ones.

    Args:
        args: Positional arguments of mmengine's ExponentialMovingAverage.
        update_buffers: Whether buffers are averaged.
        kwargs: Keyword arguments of mmengine's ExponentialMovingAverage.
    """

    def __init__(self, *args: Any, update_buffers: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, update_buffers=update_buffers, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(model)
        for average, value in zip(self.module.buffers(), model.buffers(), strict=True):
            if not value.is_floating_point():  # counters, which have no average
                average.copy_(value)
