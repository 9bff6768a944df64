# SPDX-License-Identifier: Apache-2.0
"""Write the tables of MODEL_ZOO.md: cost, published accuracy, weights, configs, measured speed.

The tables stand between markers, and the rest of the page stays as it is. Costs are counted anew, in a minute;
accuracies and links are those of the papers and their repositories; speeds those in benchmarks/results/.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..models.files import state_of
from ..models.weights import published_at
from ._common import UsageError, console, list_configs, load_config, write_file
from ._count import DENSE_SHAPES, build_dense, count_macs, multiply_adds
from ._models import OURS, count_params, family_of, find_cfg, image_of
from ._tables import markdown_table
from .info import scan_of
from .published import ADE20K_MIOU, COCO_1X_AP, COCO_3X_AP, DENSE_WEIGHTS, IMAGENET_COST, IMAGENET_TOP1, SOURCES

EXAMPLE = 'vssm zoo --check'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'file',
        metavar='FILE',
        nargs='?',
        type=Path,
        default=Path('MODEL_ZOO.md'),
        help='page to write (default: MODEL_ZOO.md)',
    )
    parser.add_argument(
        '--results',
        metavar='DIR',
        type=Path,
        help="folder of the benchmarks' figures (default: benchmarks/results beside FILE)",
    )
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 where the page is stale')


def run(args: argparse.Namespace) -> int:
    if not args.file.is_file():
        raise UsageError(
            f'FILE must be a page with the markers of the tables, got {args.file}, which {state_of(args.file)}.'
        )
    results = args.results or args.file.parent / 'benchmarks' / 'results'
    text = args.file.read_text()
    page = text
    for name, table in tables(results):
        page = replace(page, name, table, args.file)
    if page == text:
        console.print(f'{args.file} is up to date.', soft_wrap=True)
    elif args.check:
        console.print(f'{args.file} is stale: run `vssm zoo`.', soft_wrap=True)
        return 1
    else:
        write_file(args.file, page.encode())
        console.print(f'Wrote {args.file}.', soft_wrap=True)
    return 0


def replace(page: str, name: str, table: str, file: Path) -> str:
    """Put a table between its markers, `<!-- NAME -->` and `<!-- /NAME -->`."""
    first, last = f'<!-- {name} -->\n', f'<!-- /{name} -->'
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise UsageError(f'{file} must have the line {first.strip()} once, and after it {last}, got neither or others.')
    return page[: page.index(first) + len(first)] + table + page[page.index(last) :]


def tables(results: Path) -> Iterator[tuple[str, str]]:
    """The name and the text of each table."""
    yield 'imagenet', imagenet(results)
    yield 'ade20k', dense('ade20k/upernet_{}_4xb4-160k_ade20k-512x512', ADE20K_MIOU, DENSE_SHAPES['segmentor'])
    yield 'coco-1x', dense('coco/mask-rcnn_{}_fpn_8xb2-1x_coco', COCO_1X_AP, DENSE_SHAPES['detector'])
    yield 'coco-3x', dense('coco/mask-rcnn_{}_fpn_8xb2-ms-3x_coco', COCO_3X_AP, DENSE_SHAPES['detector'])


def imagenet(results: Path) -> str:
    speeds, conditions = read_speeds(results)
    rows = []
    for name in OURS:
        cfg = find_cfg(name)
        rows.append(
            [
                f'`{name}`',
                *cost(name),
                ', '.join(IMAGENET_COST.get(name, '-')),
                str(IMAGENET_TOP1.get(name, '-')),
                source(name, IMAGENET_TOP1),
                link('published', published_at(cfg)),
                str(cfg.license) if published_at(cfg) else '-',
                config_link(find_imagenet(name)),
                speeds.get(name, '-'),
            ]
        )
    header = ['model', 'scan', 'parameters', 'GMACs', 'as published', 'top-1', 'source', 'weights', 'their licence']
    header += ['config', 'images/s']
    return f'{markdown_table(header, rows)}\nimages/s: {conditions}\n'


def cost(name: str) -> tuple[str, str, str]:
    """Scan, parameters and multiply-accumulates of a classifier for its own images, on the meta device."""
    model = timm.create_model(name, device='meta').eval()
    macs = count_macs(model, image_of(name, device='meta'))
    return scan_of(model), millions(model), f'{macs / 1e9:.2f}'


def find_imagenet(name: str) -> str | None:
    """The config that trains a model on ImageNet-1K from the beginning; not every model has one."""
    found = [config for config in list_configs() if re.fullmatch(rf'imagenet/{name}_\d+xb\d+-\d+e_in1k', config)]
    return found[0] if found else None


def read_speeds(results: Path) -> tuple[dict[str, str], str]:
    """Images per second of inference, by model, and a sentence on what they were measured on."""
    file = results / 'model_cpu.json'
    if not file.is_file():
        raise UsageError(f"--results must hold the benchmarks' figures, got {results} without model_cpu.json.")
    content = json.loads(file.read_text())
    c = content['conditions']
    speeds = {row['name']: f'{row["images_per_s"]:.1f}' for row in content['rows']}
    peers = ', '.join(f'`{name}` {speed}' for name, speed in speeds.items() if name not in OURS)
    processor, kernels = c.get('processor') or c['cpu'], c.get('kernels') or c['kernel']  # kept files have either
    return speeds, (
        f'inference in float32 on the better of two memory layouts, by `{content["command"]}`, {c["threads"]} threads '
        f'of an {processor} ({kernels}), PyTorch {c["torch"].partition("+")[0]}; in the same process {peers}. '
        'Not measured on a GPU.'
    )


def dense(pattern: str, accuracies: dict[str, tuple[float, float]], shape: tuple[int, int]) -> str:
    """The table of segmentors or detectors, with the cost at the size at which papers count it."""
    rows = []
    configs = list_configs()
    for name in OURS:
        config = pattern.format(name)
        if config not in configs:
            continue
        params, macs = dense_cost(config, shape)
        accuracy = accuracies.get(name, ('-', '-'))
        weights = link('published', DENSE_WEIGHTS.get(config))
        rows.append(
            [f'`{name}`', params, macs, *map(str, accuracy), source(name, accuracies), weights, config_link(config)]
        )
    ends = ['mIoU', 'mIoU, several scales'] if accuracies is ADE20K_MIOU else ['box AP', 'mask AP']
    cost = f'GMACs at {shape[0]}x{shape[1]}'
    return markdown_table(['backbone', 'parameters', cost, *ends, 'source', 'weights', 'config'], rows)


def dense_cost(config: str, shape: tuple[int, int]) -> tuple[str, str]:
    """Parameters and multiply-accumulates of a whole segmentor or detector, on the meta device."""
    cfg = load_config(config)
    key = repr(cfg.model)
    if key not in _COUNTED:  # long and short trainings are of the same models
        model = build_dense(cfg)
        _COUNTED[key] = millions(model), f'{multiply_adds(model, shape) / 1e9:.0f}'
    return _COUNTED[key]


_COUNTED: dict[str, tuple[str, str]] = {}


def millions(model: nn.Module) -> str:
    return f'{count_params(model) / 1e6:.1f} M'


def source(name: str, accuracies: dict[str, Any]) -> str:
    return SOURCES[family_of(name)] if name in accuracies else '-'


def link(text: str, url: Any) -> str:
    return f'[{text}]({url})' if url else 'none published'


def config_link(name: str | None) -> str:
    return f'[config](configs/{name}.py)' if name else '-'


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['zoo', *sys.argv[1:]]))
