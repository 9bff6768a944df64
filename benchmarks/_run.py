# SPDX-License-Identifier: Apache-2.0
"""What every benchmark script does: read its options, time, print a table, keep the figures."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vssm.tools._bench import conditions, describe, median_seconds, synchronizer
from vssm.tools._common import console, write_json
from vssm.tools._tables import print_table

STARTED = time.monotonic()
PLACES = ('--json', '--out', '--picture', '--work-dir')  # options that say where figures are kept
NO_TIME = 'no time was left'  # why a measurement was left out that did not fail

HELP = dict(
    batch_size='images, or slides, of a batch',
    limit='seconds after which no further measurement is begun',
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


def in_time(args: argparse.Namespace, share: float = 1.0) -> bool:
    """Whether a further measurement may begin: a share of --limit has not passed since the script began."""
    return time.monotonic() - STARTED < share * args.limit


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


def run_alone(*arguments: object, **options: Any) -> str:
    """Run this script in a process of its own, with other arguments, and return what it prints.

    Args:
        *arguments: Arguments of the command.
        **options: Options of `subprocess.check_output`.
    """
    return subprocess.check_output([sys.executable, sys.argv[0], *map(str, arguments)], text=True, **options)


def keep(
    args: argparse.Namespace, rows: Any, device: str = 'cpu', left_out: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write the figures to --json with the command and the conditions, which are returned.

    Args:
        args: Arguments of the script.
        rows: Figures to write.
        device: Device that the figures are from.
        left_out: Reasons, by what was to be measured and was not.
    """
    taken_under = conditions(device)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = dict(command=command(), conditions=taken_under, rows=rows)
        write_json(args.json, content if left_out is None else dict(content, left_out=left_out))
    return taken_under


def finish(
    args: argparse.Namespace,
    rows: Any,
    title: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    device: str = 'cpu',
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Print a table, and write the figures to --json with the command and the conditions.

    Args:
        args: Arguments of the script.
        rows: Figures to write.
        title: Line above the table.
        header: Headings of the columns.
        cells: Cells of each row of the table.
        device: Device that the figures are from.
        left_out: Reasons, by what was to be measured and was not.
    """
    print_table(header, cells, title)
    for what, why in (left_out or {}).items():
        console.print(f'{what}: not measured, {why}', highlight=False, markup=False, soft_wrap=True)
    taken_under = describe(keep(args, rows, device, left_out))
    console.print(taken_under, highlight=False, markup=False, soft_wrap=True)


def command() -> str:
    """The command as it was given, without the place for its figures."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in PLACES:
            next(words)
        elif not word.startswith(tuple(f'{place}=' for place in PLACES)):
            kept.append(word)
    return shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *kept])
