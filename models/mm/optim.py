# SPDX-License-Identifier: Apache-2.0
"""timm's optimizers with timm's rules for what decays and how fast each layer learns, and bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from .utils import unwrap

__all__ = ['BFloat16OptimWrapper', 'TimmOptimWrapperConstructor']


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

    Weight decay follows timm's rules: vectors, biases and the parameters that a `no_weight_decay()` names, be it the
    model's own or that of a timm model inside, have none. With layer_decay, the rate of the last group of layers of a
    timm model, as its `group_matcher()` tells them, is lr, and that of each group before it is layer_decay times that
    of the next.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError(
                'TimmOptimWrapperConstructor: paramwise_cfg must be None, as the model names what does not decay, got '
                f'{paramwise_cfg}.'
            )
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper:
        cfg = dict(self.optim_wrapper_cfg)
        optimizer_cfg = dict(cfg.pop('optimizer'))
        weight_decay = optimizer_cfg.pop('weight_decay', 0.0)
        layer_decay = optimizer_cfg.pop('layer_decay', None)
        model = unwrap(model)
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_no_weight_decay(model))
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


def _no_weight_decay(model: nn.Module) -> set[str]:
    """The patterns of every module that has a `no_weight_decay()`, as patterns of full parameter names."""
    patterns: set[str] = set()
    for prefix, module in model.named_modules():
        names: set[str] = getattr(module, 'no_weight_decay', set)()
        patterns |= {f'{prefix}.{name}' if prefix else name for name in names}
    return patterns
