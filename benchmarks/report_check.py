# SPDX-License-Identifier: Apache-2.0
"""Hold `vssm report` against a plain loop with a clock, and its memory against the operating system's own figure.

Report and loop take turns in one process, so that both see the same machine.

    python benchmarks/report_check.py --json benchmarks/results/report_check.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from timing import conditions, write_json

import vssm  # noqa: F401  registers the models
from vssm.tools.main import main as vssm_main

MODELS = ('vmamba_tiny', 'vmamba2d_tiny', 'spatial_mamba_tiny', 'swin_tiny_patch4_window7_224')


def loop(name: str, batch_size: int, steps: int) -> float:
    """Images per second of a loop that anyone would write."""
    model, images = timm.create_model(name).eval(), torch.randn(batch_size, 3, 224, 224)
    seconds = []
    with torch.inference_mode():
        for step in range(steps + 2):
            start = time.perf_counter()
            model(images)
            if step >= 2:
                seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds)


def status_mb(key: str) -> float:
    """Of /proc/self/status; getrusage would count what the parent held before the fork."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f'{key}:'))


def resident_growth(name: str, batch_size: int) -> float:
    """MB that model, images and one inference add, at most, to what a new process held before."""
    torch.ones(512, 512) @ torch.ones(512, 512)  # threads and libraries are there before
    before = status_mb('VmRSS')
    model, images = timm.create_model(name).eval(), torch.randn(batch_size, 3, 224, 224)
    with torch.inference_mode():
        model(images)
    return status_mb('VmHWM') - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, help='timm names, for 224x224')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=3, help='turns of report and loop')
    parser.add_argument('--steps', type=int, default=9, help='of each turn')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--one', metavar='NAME', help=argparse.SUPPRESS)  # what a process for its memory does
    args = parser.parse_args()
    if args.one:
        print(resident_growth(args.one, args.batch_size))
        return

    rows = []
    for name in args.models:
        reported, looped, memory = [], [], []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, 'report.json')
                options = ['--device', 'cpu', '--batch-sizes', str(args.batch_size), '--rounds', str(args.steps)]
                vssm_main(['report', name, *options, '--json', str(file)])
                row = json.loads(file.read_text())[0]
            reported.append(row['images_per_s'])
            memory.append(row['peak_memory_mb'])
            looped.append(loop(name, args.batch_size, args.steps))
        command = [sys.executable, __file__, '--batch-size', str(args.batch_size), '--one', name]
        rows.append(
            dict(
                name=name,
                report_images_per_s=statistics.median(reported),
                loop_images_per_s=statistics.median(looped),
                report_mb=statistics.median(memory),
                system_mb=float(subprocess.check_output(command, text=True)),
            )
        )
    table = Table(title=f'batch {args.batch_size}, 224x224, float32', caption=str(conditions()))
    for heading in ('model', 'report images/s', 'loop images/s', 'ratio', 'report MB', 'system MB'):
        table.add_column(heading, justify='left' if heading == 'model' else 'right')
    for row in rows:
        speeds = row['report_images_per_s'], row['loop_images_per_s']
        ratio = f'{speeds[0] / speeds[1]:.3f}'
        table.add_row(
            row['name'], *(f'{v:.2f}' for v in speeds), ratio, f'{row["report_mb"]:.0f}', f'{row["system_mb"]:.0f}'
        )
    Console().print(table)
    if args.json:
        write_json(args.json, f'python benchmarks/report_check.py --batch-size {args.batch_size}', rows)


if __name__ == '__main__':
    main()
