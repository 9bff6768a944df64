# SPDX-License-Identifier: Apache-2.0
"""Hold `vssm report` against a plain loop with a clock, and its memory against the operating system's own figure.

Report and loop take turns in one process, so that both see the same machine.

    python benchmarks/report_check.py --json benchmarks/results/report_check.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _models import MODELS, make
from _run import finish, make_parser, parse, run_alone

from vssm.tools._memory import peak_resident_bytes, resident_bytes
from vssm.tools.main import main as vssm_main


def loop(name: str, batch_size: int, steps: int) -> float:
    """Images per second of a loop that anyone would write."""
    model, images = make(name, 224, batch_size)
    seconds = []
    with torch.inference_mode():
        for step in range(steps + 2):
            start = time.perf_counter()
            model(images)
            if step >= 2:
                seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds)


def report(name: str, batch_size: int, steps: int) -> dict[str, Any]:
    """The row that `vssm report` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'report.json')
        options = ['--device', 'cpu', '--batch-sizes', str(batch_size), '--rounds', str(steps)]
        vssm_main(['report', name, *options, '--json', str(file)])
        return json.loads(file.read_text())[0]


def resident_growth(name: str, batch_size: int) -> float:
    """MB that model, images and one inference add, at most, to what a new process held before."""
    torch.ones(512, 512) @ torch.ones(512, 512)  # threads and libraries are there before
    before = resident_bytes()
    model, images = make(name, 224, batch_size)
    with torch.inference_mode():
        model(images)
    return (peak_resident_bytes() - before) / 1e6


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    reported, looped = [], []
    for _ in range(args.rounds):
        reported.append(report(name, args.batch_size, args.steps))
        looped.append(loop(name, args.batch_size, args.steps))
    return dict(
        name=name,
        report_images_per_s=statistics.median(row['images_per_s'] for row in reported),
        loop_images_per_s=statistics.median(looped),
        report_mb=statistics.median(row['peak_memory_mb'] for row in reported),
        system_mb=float(run_alone('--batch-size', args.batch_size, '--one', name)),
    )


def main() -> None:
    parser = make_parser(__doc__, MODELS, batch_size=8, rounds=3)
    parser.add_argument('--steps', type=int, default=9, help='steps in each turn of report and of loop')
    parser.add_argument('--one', metavar='NAME', help=argparse.SUPPRESS)  # what a process for its memory does
    args = parse(parser)
    if args.one:
        print(resident_growth(args.one, args.batch_size))
        return

    rows = [measure(name, args) for name in args.models]
    cells = [
        [
            row['name'],
            f'{row["report_images_per_s"]:.2f}',
            f'{row["loop_images_per_s"]:.2f}',
            f'{row["report_images_per_s"] / row["loop_images_per_s"]:.3f}',
            f'{row["report_mb"]:.0f}',
            f'{row["system_mb"]:.0f}',
        ]
        for row in rows
    ]
    header = ['model', 'report images/s', 'loop images/s', 'ratio', 'report MB', 'system MB']
    finish(args, rows, f'batch {args.batch_size}, 224x224, float32', header, cells)


if __name__ == '__main__':
    main()
