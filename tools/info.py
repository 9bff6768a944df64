# SPDX-License-Identifier: Apache-2.0
"""List the models: scan, size, cost, published accuracy and weights.

The scan is 1-D, 2-D, or 'fused': 1-D with its states then fused over their neighbourhood.

GMACs are billions of multiply-accumulates of one image at the given input size, counted as the papers count: a norm as
5 per element, VMamba's pooling as 1, activations, sums and products as none, the ops by the formulas in ops/. The
accuracy on ImageNet-1K is what the papers report. Weights are downloaded by pretrained=True, from a URL ('url') or from
the repository of the Hugging Face Hub that is named, first fetched by `vssm download` ('fetch'), already in the cache
('cached'), or published nowhere ('-'); the licence is theirs.
"""

import argparse
import fnmatch
import sys
from typing import Any

import timm
from timm.models import PretrainedCfg

from ..models.weights import cached_path, is_cached, list_models, published_at
from ._common import UsageError
from ._count import count_macs
from ._models import count_params, find_cfg, find_model, image_of
from ._tables import print_table
from .published import IMAGENET_TOP1

EXAMPLE = "vssm info 'vmamba2d_*'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'pattern',
        metavar='NAME',
        nargs='?',
        default='*',
        help='a model, the beginning of names, or a pattern, * for any text',
    )


def run(args: argparse.Namespace) -> int:
    names = fnmatch.filter(list_models(), args.pattern)
    if not names:
        try:
            names = [find_model(args.pattern)]
        except UsageError:
            names = fnmatch.filter(list_models(), f'{args.pattern}*')
            if not names:
                raise
    rows = []
    for name in names:
        model, image = timm.create_model(name, device='meta').eval(), image_of(name, device='meta')
        cfg = find_cfg(name)
        rows.append(
            [
                name,
                scan_of(model),
                f'{count_params(model) / 1e6:.3f}',
                f'{count_macs(model, image) / 1e9:.4f}',
                'x'.join(map(str, image.shape[2:])),
                str(IMAGENET_TOP1.get(name, '-')),
                weights_of(cfg),
                str(cfg.license) if published_at(cfg) else '-',
            ]
        )
    header = ['model', 'scan', 'params/M', 'GMACs', 'input', 'top-1', 'weights', 'licence']
    print_table(header, rows)
    return 0


def scan_of(model: Any) -> str:
    mixer: Any = next(module for name, module in model.named_modules() if name.endswith('.mixer'))
    return 'fused' if hasattr(mixer, 'fusion') else f'{getattr(mixer, "scan_ndim", 1)}-D'


def weights_of(cfg: PretrainedCfg) -> str:
    if not published_at(cfg):
        return '-'
    if is_cached(cached_path(cfg)):
        return 'cached'
    if cfg.url:
        return 'url'
    return cfg.hf_hub_id or 'fetch'


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['info', *sys.argv[1:]]))
