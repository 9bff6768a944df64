# SPDX-License-Identifier: Apache-2.0
"""What every benchmark script does: read its options, time, print a table, keep the figures."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vssm.tools._bench import conditions, describe, median_seconds, synchronizer
from vssm.tools._common import write_json
from vssm.tools._tables import print_table, wide_console

HELP = dict(
    batch_size='images of a batch',
    rounds='rounds to measure',
    threads="threads of the CPU; 0: PyTorch's choice",
)


def make_parser(description: str, models: Sequence[str] = (), **defaults: int) -> argparse.ArgumentParser:
    """A parser of the options that scripts share.

    Args:
        description: Docstring of the script.
        models: Names to measure by default; without them the script takes no names.
        **defaults: Values of those options of HELP that the script has.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if models:
        parser.add_argument('models', nargs='*', default=models, help='timm names')
    for name, default in defaults.items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=default, help=HELP[name])
    parser.add_argument('--json', metavar='FILE', type=Path, help='where to keep the figures')
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments of the command, and set the threads and the seed."""
    args = parser.parse_args()
    if getattr(args, 'threads', 0):
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def parse_cuda(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments of a script for a GPU and add the device, the CPU for --dry-run."""
    parser.add_argument('--dry-run', action='store_true', help='make every call once on the CPU, and time nothing')
    args = parse(parser)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error('needs a CUDA GPU, and PyTorch finds none; --dry-run goes without')
    args.device = 'cpu' if args.dry_run else 'cuda'
    return args


def time_on_device(
    args: argparse.Namespace, steps: Mapping[Any, Callable[[], Any]], repeats: int = 1
) -> dict[Any, float]:
    """The median seconds of each of several steps, on the device of `parse_cuda`.

    Args:
        args: Arguments that `parse_cuda` gave; a dry run makes every step once.
        steps: Steps to time, by name.
        repeats: Number of steps in a turn.
    """
    if args.dry_run:
        return median_seconds(steps, rounds=1, warmup=0)
    return median_seconds(steps, args.rounds, 3, repeats, synchronizer(args.device))


def run_alone(*arguments: object) -> str:
    """Run this script in a process of its own, with other arguments, and return what it prints."""
    return subprocess.check_output([sys.executable, sys.argv[0], *map(str, arguments)], text=True)


def finish(
    args: argparse.Namespace,
    rows: Any,
    title: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    device: str = 'cpu',
) -> None:
    """Print a table, and write the figures to --json with the command and the conditions.

    Args:
        args: Arguments of the script.
        rows: Figures to write.
        title: Line above the table.
        header: Headings of the columns.
        cells: Cells of each row of the table.
        device: Device that the figures are from.
    """
    taken_under = conditions(device)
    console = wide_console()
    print_table(header, cells, title, to=console, fold=True)
    console.print(describe(taken_under), soft_wrap=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, dict(command=command(), conditions=taken_under, rows=rows))


def command() -> str:
    """The command as it was given, without the file for its figures."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == '--json':
            next(words)
        elif not word.startswith('--json='):
            kept.append(word)
    return shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *kept])
