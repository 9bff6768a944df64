# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates, activations and parameters of models, as papers count them."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..models import SpatialMamba, Vim, VMamba
from ..ops import use_reference
from ..ops.counting import ACTIVATIONS, MACS
from ._models import count_params

if TYPE_CHECKING:
    from mmengine.config import Config

aten = torch.ops.aten

# The one table of rules beside products and convolutions, which all counters count alike, and our ops, whose formulas
# are in ops/: multiply-accumulates for an element of an operation's input. They are fvcore's, by which papers count.
RULES = dict(layer_norm=5, batch_norm=2, mean=0, adaptive_avg_pool2d=1, upsample_bilinear2d=4)
OF_OUTPUT = {'upsample_bilinear2d'}  # here the rule is for an element of the output

# Where PyTorch's counter meets them; it decomposes a batch norm unless the overload has a rule, too.
OPERATIONS = {
    aten.native_layer_norm: 'layer_norm',
    aten.native_batch_norm: 'batch_norm',
    aten.native_batch_norm.default: 'batch_norm',
    aten.mean: 'mean',
    aten.upsample_bilinear2d: 'upsample_bilinear2d',
}


def rules_of(model: nn.Module) -> dict[str, int]:
    """The rules for a model: RULES, but for our classifiers what their authors counted.

    They counted a batch norm as in training, and VMamba's mean as the pooling layer that it was. What Vim's
    authors counted is not known; fvcore has no rule for its RMS norms, which are layer norms without a mean.
    """
    if isinstance(model, (SpatialMamba, VMamba)):
        return RULES | dict(batch_norm=5, mean=int(isinstance(model, VMamba)))
    if isinstance(model, Vim):
        return RULES | dict(rms_norm=4)
    return RULES


@dataclass
class Cost:
    """Counts for one image.

    `modules` has those of each part, `uncounted` names attentions, which fvcore leaves out, `missed` has the modules
    whose parameters an operation uses that no formula counts.
    """

    params: int
    activations: int
    macs: int
    modules: list[dict[str, Any]]
    uncounted: list[str]
    missed: dict[str, list[str]]


def count_fvcore(model: nn.Module, image: Tensor, depth: int = 0) -> Cost:
    """Trace a model with fvcore, which computes it once: parts of it have no way on the meta device.

    Activations are the elements that convolutions and matrix products give, fvcore's rule, also those within our ops.
    Models of other libraries are counted by fvcore's rules alone, ours by those of `rules_of`.

    Args:
        model: Model in evaluation mode, on the CPU.
        image: Image, (1, in_chans, H, W).
        depth: Number of levels of modules to list.
    """
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter

    from ._trace import Trace

    macs, activations = (kind(model, image) for kind in (FlopCountAnalysis, ActivationCountAnalysis))
    macs.set_op_handle(**MACS)
    activations.set_op_handle(**ACTIVATIONS)
    rules = rules_of(model)
    for name in rules:
        if rules[name] != RULES.get(name):
            macs.set_op_handle(f'aten::{name}', elementwise_flop_counter(rules[name], 0))

    both = Trace(model, image)  # one for the two
    for name in {**macs._op_handles, **activations._op_handles}:
        both.set_op_handle(name, _both(macs._op_handles.get(name), activations._op_handles.get(name)))
    with torch.no_grad(), use_reference(False):  # the reference has other operations, which cost otherwise
        counts = both.by_module_and_operator()
    modules = [
        dict(
            name=name,
            params=count_params(module),
            activations=int(counts[name]['activations']),
            gmacs=counts[name]['macs'] / 1e9,
        )
        for name, module in model.named_modules()
        if name and name.count('.') < depth and name in counts
    ]
    uncounted = [op.removeprefix('aten::') for op in both.unsupported_ops() if 'attention' in op]
    missed = {op: modules_of(names, model) for op, names in sorted((both.missed or {}).items()) if op not in uncounted}
    total = counts['']
    return Cost(count_params(model), int(total['activations']), int(total['macs']), modules, uncounted, missed)


def modules_of(parameters: Collection[str], model: nn.Module) -> list[str]:
    """The modules that parameters belong to, in the model's order; the model itself by the names of its parameters."""
    owners = [name.rpartition('.')[0] or name for name, _ in model.named_parameters() if name in parameters]
    return list(dict.fromkeys(owners))


def _both(macs: Callable | None, activations: Callable | None) -> Callable:
    def total(handle: Callable | None, inputs: list[Any], outputs: list[Any]) -> int:
        count = handle(inputs, outputs) if handle else 0
        return sum(count.values()) if isinstance(count, Counter) else count

    return lambda *values: Counter(macs=total(macs, *values), activations=total(activations, *values))


class _WholeOperations(TorchFunctionMode):
    """Counts those operations of which PyTorch's counter sees the parts, and leaves out attention, as fvcore does."""

    RULES = {F.rms_norm: 'rms_norm', F.adaptive_avg_pool2d: 'adaptive_avg_pool2d'}

    def __init__(self, rules: Mapping[str, int]) -> None:
        super().__init__()
        self.rules, self.macs = rules, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        if func in self.RULES:
            self.macs += self.rules.get(self.RULES[func], 0) * args[0].numel()
        return func(*args, **(kwargs or {}))


def count_torch(forward: Callable[[Tensor], Any], image: Tensor, rules: Mapping[str, int] | None = None) -> int:
    """Multiply-accumulates by PyTorch's FlopCounterMode; on the meta device they cost no computation.

    Args:
        forward: Model in evaluation mode, or a part of one.
        image: Image, (1, in_chans, H, W).
        rules: Rules such as RULES; without them PyTorch counts products, convolutions and our ops alone.
    """
    formulas = {op: _formula(name, rules[name]) for op, name in OPERATIONS.items()} if rules else {}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    whole = _WholeOperations(rules) if rules else None
    with torch.no_grad(), use_reference(False), counter, whole or nullcontext():  # the reference costs otherwise
        forward(image)
    return counter.get_total_flops() // 2 + (whole.macs if whole else 0)  # it counts two for a multiply-accumulate


def _formula(name: str, macs: int) -> Callable[..., int]:
    """FLOPs of an operation by the shapes of its first input and its output."""
    of_output = name in OF_OUTPUT
    return lambda x, *args, out_shape, **kwargs: 2 * macs * math.prod(out_shape if of_output else x)


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one of our classifiers by fvcore's rules.

    fvcore itself has to trace the model, for which PyTorch's convolution on the meta device is not made.

    Args:
        model: Classifier in evaluation mode, here on the meta device.
        image: Image, (1, in_chans, H, W).
    """
    return count_torch(model, image, rules_of(model))


# Height and width of the image at which papers count.
DENSE_SHAPES = dict(segmentor=(512, 2048), detector=(800, 1280))


def dense_kind(cfg: 'Config') -> str | None:
    """Whether a config's model is a 'segmentor' or a 'detector', one with masks; None if it is neither."""
    if 'decode_head' in cfg.model:
        return 'segmentor'
    return 'detector' if (cfg.model.get('roi_head') or {}).get('mask_head') else None


def has_open_classes(cfg: 'Config') -> bool:
    """Whether a config leaves the number of classes to the data."""
    from ..models.mm.own_classes import open_heads

    return bool(open_heads(cfg))


def build_dense(cfg: 'Config') -> nn.Module:
    """The whole segmentor or detector of a config, on the meta device, in evaluation mode."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model).eval()


def multiply_adds(model: Any, shape: Sequence[int], rules: Mapping[str, int] | None = RULES) -> int:
    """Multiply-accumulates of a segmentor or of a Mask R-CNN.

    Those of the segmentor are without its auxiliary head, those of the Mask R-CNN with 1000 proposals and 100 masks.

    Args:
        model: Segmentor or detector, such as `build_dense` makes.
        shape: Height and width of the image.
        rules: Rules that `count_torch` takes.
    """

    def forward(image: Tensor) -> None:
        features = model.extract_feat(image)
        if hasattr(model, 'decode_head'):
            model.decode_head(features)
        else:
            channels = model.neck.out_channels
            model.rpn_head(features)
            model.roi_head.bbox_head(image.new_empty(1000, channels, 7, 7))
            model.roi_head.mask_head(image.new_empty(100, channels, 14, 14))

    with torch.device('meta'):
        return count_torch(forward, torch.empty(1, 3, *shape), rules)
