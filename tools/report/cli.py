# SPDX-License-Identifier: Apache-2.0
"""The options of the command, and which of them are refused."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from .._common import UsageError, to_json, write_file
from .._models import find_timm_model
from .._pictures import save_figure
from ..published import IMAGENET_TOP1
from .counts import accuracy_of
from .measure import conditions_of, measure, sizes_of
from .plot import draw
from .row import Row
from .tables import show, to_csv, to_markdown

EXAMPLE = "vssm report 'vmamba_*' swin_tiny_patch4_window7_224 --sizes 224 384 --plot report.png"

DTYPES = ('float32', 'bfloat16', 'float16')


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', metavar='MODEL', nargs='*', help='a timm name, or a pattern, * for any text')
    parser.add_argument(
        '--sizes', metavar='N', nargs='+', type=positive, help="sides of the image (default: each model's own)"
    )
    parser.add_argument(
        '--batch-sizes', metavar='N', nargs='+', type=positive, default=[8], help='images at a time (default: 8)'
    )
    parser.add_argument(
        '--dtype', nargs='+', choices=DTYPES, default=['float32'], help='types to compute in (default: float32)'
    )
    parser.add_argument('--device', help='cpu or cuda or cuda:N (default: a GPU where there is one)')
    parser.add_argument('--threads', metavar='N', type=positive, help="threads of the CPU (default: PyTorch's choice)")
    parser.add_argument('--compile', action='store_true', help='torch.compile the models')
    parser.add_argument('--channels-last', action='store_true', help='models and images in channels-last memory')
    parser.add_argument('--train', action='store_true', help='time and weigh a training step, too')
    parser.add_argument('--no-throughput', action='store_true', help='count, time nothing')
    parser.add_argument('--rounds', metavar='N', type=positive, default=9, help='rounds to time (default: 9)')
    parser.add_argument('--warmup', metavar='N', type=positive, default=2, help='rounds before them (default: 2)')
    parser.add_argument('--depth', metavar='N', type=positive, default=0, help='list the modules of N levels, too')
    parser.add_argument(
        '--config',
        metavar='CONFIG',
        help='count the whole segmentor or Mask R-CNN of a config, by name or path; with 1000 proposals and 100 masks, '
        'without an auxiliary head',
    )
    parser.add_argument(
        '--shape',
        metavar=('H', 'W'),
        nargs=2,
        type=positive,
        help='image of --config (default: 512 2048 for a segmentor, 800 1280 for a detector)',
    )
    for name, what in dict(md='a table in Markdown', csv='the rows', json='the rows, with the modules').items():
        parser.add_argument(f'--{name}', metavar='FILE', help=f'write {what}')
    parser.add_argument(
        '--plot',
        metavar='FILE',
        type=Path,
        help='draw published accuracy against throughput, or with several sizes throughput and memory against them',
    )


def run(args: argparse.Namespace) -> int:
    files = {name: getattr(args, name) for name in ('md', 'csv', 'json') if getattr(args, name)}
    names = check(args, files)
    rows: list[Row] = []
    interrupted = False
    with contextlib.redirect_stdout(sys.stderr) if '-' in files.values() else contextlib.nullcontext():
        try:
            measure(args, names, rows)
        except KeyboardInterrupt:
            interrupted = True
            rows = [row for row in rows if row.params or row.error]
        for row in rows:
            row.conditions = row.conditions or conditions_of(args)
        show(rows, interrupted)
    texts = dict(md=to_markdown, csv=to_csv, json=lambda rows: to_json([row.nested() for row in rows]))
    for name, file in files.items():
        text = texts[name](rows)
        if file == '-':
            sys.stdout.write(text)
        else:
            write_file(Path(file), text.encode())
    if args.plot:
        with contextlib.redirect_stdout(sys.stderr):
            save_figure(draw(rows), args.plot)
    return 130 if interrupted else int(bool(rows) and all(row.error for row in rows))


def check(args: argparse.Namespace, files: dict[str, str]) -> list[str]:
    """Refuse bad options before minutes are spent, and return the models' names.

    Raises:
        UsageError: An option is not as it must be.
    """
    names = find_models(args.models)
    if not names and not args.config:
        raise UsageError('MODEL must be at least one name or pattern, or --config be given, got none.')
    if list(files.values()).count('-') > 1:
        raise UsageError(f'one of --md, --csv and --json can be -, the standard output, got {" ".join(files)}.')
    paths = [Path(file) for file in (*files.values(), args.plot) if file and file != '-']
    for path in paths:
        if not path.parent.is_dir() or path.is_dir() or paths.count(path) > 1:
            raise UsageError(f'FILE must be one of its own in a folder that exists, got {path}.')
    if args.shape and not args.config:
        raise UsageError('--shape needs --config; --sizes is for models.')
    if args.plot:
        check_plot(args, names)
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    return names


def check_plot(args: argparse.Namespace, names: Sequence[str]) -> None:
    import matplotlib  # noqa: F401  # a missing package is better told now than after the measuring

    if args.no_throughput or not names:
        raise UsageError('--plot needs what is timed: MODEL, without --no-throughput.')
    if args.plot.suffix not in ('.png', '.svg', '.pdf'):
        raise UsageError(f'--plot must end in .png, .svg or .pdf, got {args.plot}.')
    if len(sizes_of(args)) == 1 and not any(accuracy_of(name) for name in names):
        known = ', '.join(IMAGENET_TOP1)
        raise UsageError(f'--plot with one size needs a model whose accuracy is published: {known}; or --sizes.')


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise UsageError(f'--device must be cpu, cuda or cuda:N, got {name}.')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise UsageError(f'--device must be there, got {name}, where PyTorch finds {count} CUDA devices.')


def find_models(patterns: Sequence[str]) -> list[str]:
    """The names of timm's registry, ours among them, that names and patterns stand for, each once."""
    names: list[str] = []
    for pattern in patterns:
        if any(c in pattern for c in '*?['):
            found = timm.list_models(pattern)
            if not found:
                raise UsageError(f'MODEL must match a model of timm, got {pattern!r}.')
        else:
            found = [find_timm_model(pattern)]
        names += found
    return list(dict.fromkeys(names))
