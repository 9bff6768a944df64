# SPDX-License-Identifier: Apache-2.0
"""List the models: scan, size, cost and weights.

GMACs are billions of multiply-accumulates of one image at the given input size, counted as the papers count: a layer
norm as 5 per element, a pooling as 1, an activation as none, the scan by the formula in ops/selective_scan.py.
"""

import argparse
import fnmatch
import math
import sys
from typing import Any, List

from rich.table import Table

from ._common import UsageError, console, did_you_mean

EXAMPLE = "vssm info 'vmamba2d_*'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', metavar='NAME', nargs='?', default='*', help='a model, or a pattern, * for any text')


def run(args: argparse.Namespace) -> int:
    import timm
    import torch

    all_names = list_models()
    names = fnmatch.filter(all_names, args.pattern)
    if not names:
        raise UsageError(
            f'NAME must match one of the models that `vssm info` lists, got {args.pattern!r}.'
            f'{did_you_mean(args.pattern, all_names)}'
        )
    table = Table()
    for header in ('model', 'scan', 'params (M)', 'GMACs', 'input', 'weights'):
        table.add_column(header, justify='right' if header in ('params (M)', 'GMACs') else 'left', no_wrap=True)
    for name in names:
        model = timm.create_model(name, device='meta').eval()
        cfg = timm.get_pretrained_cfg(name)
        scan = {m.scan_ndim for m in model.modules() if hasattr(m, 'scan_ndim')}
        image = torch.empty(1, *cfg.input_size, device='meta')
        table.add_row(
            name,
            ', '.join(f'{ndim}-D' for ndim in sorted(scan)),
            f'{sum(p.numel() for p in model.parameters()) / 1e6:.3f}',
            f'{count_macs(model, image) / 1e9:.4f}',
            'x'.join(map(str, cfg.input_size)),
            'yes' if cfg.has_weights else 'no',
        )
    console.print(table)
    return 0


def list_models() -> List[str]:
    """The models of timm's registry that are ours."""
    import timm

    package = __name__.partition('.')[0]
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f'{package}.')]


def count_macs(model: Any, image: Any) -> int:
    """Multiply-accumulates of one forward pass by fvcore's rules; costs no computation on the meta device.

    fvcore itself has to trace the model, for which PyTorch's convolution on the meta device is not made.

    Args:
        model: An nn.Module in evaluation mode.
        image: (1, in_chans, H, W).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..ops import use_reference

    flops = {  # of an operation with its inputs' shapes; PyTorch counts two for a multiply-accumulate
        torch.ops.aten.native_layer_norm: lambda x, *args, **kwargs: 2 * 5 * math.prod(x),
        torch.ops.aten.mean: lambda x, *args, **kwargs: 2 * math.prod(x),
    }
    counter = FlopCounterMode(display=False, custom_mapping=flops)
    with torch.no_grad(), use_reference(False), counter:  # the reference is other operations, of another cost
        model(image)
    return counter.get_total_flops() // 2


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['info', *sys.argv[1:]]))
