# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates, activations and parameters of models, as papers count them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import SpatialMamba, VMamba
from ..ops import selective_scan_fvcore_macs, state_fusion_fvcore_macs, use_reference


@dataclass
class Cost:
    """Of one image; `modules` has the same of each part, `uncounted` what fvcore leaves out although it costs."""

    params: int
    activations: int
    macs: int
    modules: list[dict[str, Any]]
    uncounted: list[str]


def count_fvcore(model: nn.Module, image: Tensor, depth: int = 0) -> Cost:
    """Trace a model with fvcore, which computes it once: parts of it have no way on the meta device.

    Activations are the elements that convolutions and matrix products give, fvcore's rule, also those within our ops.
    Other libraries' models have fvcore's count as it is. In ours a batch norm counts as in training, 5 per element, and
    VMamba's mean as the pooling layer that its authors' counter saw.

    Args:
        model: In evaluation mode, on the CPU.
        image: (1, in_chans, H, W).
        depth: How many levels of modules to list.
    """
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
    from fvcore.nn.jit_analysis import JitModelAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter

    macs, activations = (kind(model, image) for kind in (FlopCountAnalysis, ActivationCountAnalysis))
    macs.set_op_handle('vssm::selective_scan', selective_scan_fvcore_macs)
    macs.set_op_handle('vssm::state_fusion', state_fusion_fvcore_macs)
    activations.set_op_handle('vssm::selective_scan', _scan_activations)
    activations.set_op_handle('vssm::state_fusion', _fusion_activations)
    if isinstance(model, (SpatialMamba, VMamba)):
        macs.set_op_handle('aten::batch_norm', elementwise_flop_counter(5, 0))
        macs.set_op_handle('aten::mean', elementwise_flop_counter(int(isinstance(model, VMamba)), 0))

    both = JitModelAnalysis(model, image)  # one trace for the two
    both.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    for name in {**macs._op_handles, **activations._op_handles}:
        both.set_op_handle(name, _both(macs._op_handles.get(name), activations._op_handles.get(name)))
    with torch.no_grad(), use_reference(False):  # the reference is other operations, of another cost
        counts = both.by_module_and_operator()
    modules = [
        dict(
            name=name,
            params=_params(module),
            activations=int(counts[name]['activations']),
            gmacs=counts[name]['macs'] / 1e9,
        )
        for name, module in model.named_modules()
        if name and name.count('.') < depth and name in counts
    ]
    uncounted = [op.removeprefix('aten::') for op in both.unsupported_ops() if 'attention' in op]
    total = counts['']
    return Cost(_params(model), int(total['activations']), int(total['macs']), modules, uncounted)


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _both(macs: Callable | None, activations: Callable | None) -> Callable:
    def total(handle: Callable | None, inputs: list[Any], outputs: list[Any]) -> int:
        count = handle(inputs, outputs) if handle else 0
        return sum(count.values()) if isinstance(count, Counter) else count

    return lambda *values: Counter(macs=total(macs, *values), activations=total(activations, *values))


def _scan_activations(inputs: list[Any], outputs: list[Any]) -> int:
    """The step sizes of every channel, where the op expands them: a matrix product."""
    x, K, dt_weight = inputs[0].type().sizes(), inputs[2].type().sizes()[0], inputs[7]
    return math.prod(x) * K if dt_weight.isCompleteTensor() else 0


def _fusion_activations(inputs: list[Any], outputs: list[Any]) -> int:
    return 3 * math.prod(inputs[0].type().sizes())  # three convolutions


def count_torch(model: nn.Module, image: Tensor, rules: dict[Any, Callable] | None = None) -> int:
    """Multiply-accumulates by PyTorch's FlopCounterMode, which counts two FLOPs for one.

    Args:
        model: Any callable; on the meta device it costs no computation.
        image: (1, in_chans, H, W).
        rules: More formulas, as `custom_mapping` takes them.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(use_reference(False))
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=rules))
        model(image)
    return counter.get_total_flops() // 2


# ---- detectors and segmentors ----------------------------------------------------------------------------------------


def _each(factor: int, of_output: bool = False) -> Callable[..., int]:
    """Of an operation with its inputs' shapes: so many for each element of its first input or of its output."""
    return lambda x, *args, out_shape, **kwargs: 2 * factor * math.prod(out_shape if of_output else x)


# fvcore's rules, by which the published numbers were counted; PyTorch counts two for a multiply-add.
RULES = {
    torch.ops.aten.native_layer_norm: _each(5),
    torch.ops.aten.native_batch_norm: _each(2),
    torch.ops.aten.native_batch_norm.default: _each(2),  # both, or the counter decomposes it
    torch.ops.aten._adaptive_avg_pool2d: _each(1),
    torch.ops.aten.upsample_bilinear2d: _each(4, of_output=True),
}


def multiply_adds(model: nn.Module, shape: Sequence[int], rules: dict[Any, Callable] | None = RULES) -> int:
    """Of a segmentor without its auxiliary head, of a Mask R-CNN with 1000 proposals and 100 masks.

    Args:
        model: What mmseg's or mmdet's registry builds, on the meta device, in evaluation mode.
        shape: Height and width of the image.
        rules: As of `count_torch`; None counts as PyTorch does.
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
