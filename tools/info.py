# SPDX-License-Identifier: Apache-2.0
"""List the models: scan, size, cost, published accuracy and weights.

The scan is 1-D, 2-D, or 'fused': 1-D with its states then fused over their neighbourhood.

GMACs are billions of multiply-accumulates of one image at the given input size, counted as the papers count: a norm as
5 per element, VMamba's pooling as 1, activations, sums and products as none, the ops by the formulas in ops/. The
accuracy on ImageNet-1K is what the papers report. Weights are downloaded by pretrained=True ('url'), first fetched by
`vssm download` ('fetch'), already in the cache ('cached'), or published nowhere ('-').
"""

import argparse
import fnmatch
import math
import sys
from collections.abc import Callable
from typing import Any

from rich.table import Table

from ..models.weights import cached_path, is_cached, list_models
from ._common import console, find_model
from .published import IMAGENET_TOP1

EXAMPLE = "vssm info 'vmamba2d_*'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', metavar='NAME', nargs='?', default='*', help='a model, or a pattern, * for any text')


def run(args: argparse.Namespace) -> int:
    import timm
    import torch

    names = fnmatch.filter(list_models(), args.pattern)
    if not names:
        names = [find_model(args.pattern)]
    table = Table()
    numbers = ('params/M', 'GMACs', 'top-1')
    for header in ('model', 'scan', *numbers[:2], 'input', numbers[2], 'weights'):
        table.add_column(header, justify='right' if header in numbers else 'left', no_wrap=True)
    for name in names:
        model = timm.create_model(name, device='meta').eval()
        cfg = timm.get_pretrained_cfg(name)
        image = torch.empty(1, *cfg.input_size, device='meta')
        table.add_row(
            name,
            scan_of(model),
            f'{sum(p.numel() for p in model.parameters()) / 1e6:.3f}',
            f'{count_macs(model, image) / 1e9:.4f}',
            'x'.join(map(str, cfg.input_size[1:])),
            str(IMAGENET_TOP1.get(name, '-')),
            weights_of(cfg),
        )
    console.print(table)
    return 0


def scan_of(model: Any) -> str:
    mixer = model.stages[0].blocks[0].mixer
    return 'fused' if hasattr(mixer, 'fusion') else f'{mixer.scan_ndim}-D'


def weights_of(cfg: Any) -> str:
    if not cfg.url and not cfg.origin_url:
        return '-'
    if is_cached(cached_path(cfg)):
        return 'cached'
    return 'url' if cfg.url else 'fetch'


def count_macs(model: Any, image: Any) -> int:
    """Multiply-accumulates of one forward pass by fvcore's rules; costs no computation on the meta device.

    fvcore itself has to trace the model, for which PyTorch's convolution on the meta device is not made.

    Args:
        model: An nn.Module in evaluation mode.
        image: (1, in_chans, H, W).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..models import SpatialMamba
    from ..ops import use_reference

    def elementwise(macs: int) -> Callable[..., int]:
        return lambda x, *args, **kwargs: 2 * macs * math.prod(x)  # PyTorch counts two for a multiply-accumulate

    flops = {  # of an operation with its inputs' shapes
        torch.ops.aten.native_layer_norm: elementwise(5),
        torch.ops.aten.native_batch_norm: elementwise(5),
        torch.ops.aten.native_batch_norm.default: elementwise(5),  # both, or the counter decomposes it
        # Their authors' counters see VMamba's pooling layer, and not the mean that Spatial-Mamba takes.
        torch.ops.aten.mean: elementwise(0 if isinstance(model, SpatialMamba) else 1),
    }
    counter = FlopCounterMode(display=False, custom_mapping=flops)
    with torch.no_grad(), use_reference(False), counter:  # the reference is other operations, of another cost
        model(image)
    return counter.get_total_flops() // 2


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['info', *sys.argv[1:]]))
