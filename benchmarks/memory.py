# SPDX-License-Identifier: Apache-2.0
"""Peak memory of inference and of a training step against the image's size, beside the weights.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json
    python benchmarks/memory.py --sizes 2048 --inference --json benchmarks/results/memory_cpu_2048.json

Each figure comes from a process of its own: on the CPU the growth of its resident size, on a GPU that of what PyTorch's
allocator holds.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from timing import write_json

import vssm  # noqa: F401  registers the models
from vssm.tools._measure import NO_PEAK, conditions, peak_growth

MODELS = ('swin_tiny_patch4_window7_224', 'vmamba_tiny', 'vmamba2d_tiny', 'spatial_mamba_tiny')


def measure(name: str, size: int, batch_size: int, train: bool, device: str) -> float:
    """MB, in 10^6 bytes, that one step needs besides weights and images; with the gradients in training."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, **(dict(img_size=size) if fixed else {})).train(train).to(device)
    images = torch.randn(batch_size, 3, size, size, device=device)

    def step() -> None:
        with torch.set_grad_enabled(train):
            y = model(images)
            if train:
                y.square().mean().backward()
                model.zero_grad()

    step()
    growth = peak_growth(step, torch.device(device))
    if growth is None:
        raise SystemExit(NO_PEAK)
    return growth / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, help='timm names')
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 384, 512, 768])
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--inference', action='store_true', help='leave out the training step')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--rounds', type=int, default=3, help='processes; their median counts')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--one', nargs=2, metavar=('NAME', 'STEP'), help=argparse.SUPPRESS)  # what such a process does
    args = parser.parse_args()
    if args.one:
        name, step = args.one
        print(measure(name, args.sizes[0], args.batch_size, step == 'train', args.device))
        return

    rows = []
    for size in args.sizes:
        for name in args.models:
            row = dict(name=name, size=size)
            for step in ('inference',) if args.inference else ('inference', 'train'):
                options = [
                    '--sizes',
                    size,
                    '--batch-size',
                    args.batch_size,
                    '--device',
                    args.device,
                    '--one',
                    name,
                    step,
                ]
                command = [sys.executable, __file__, *map(str, options)]
                found = [float(subprocess.check_output(command, text=True)) for _ in range(args.rounds)]
                row[f'{step}_mb'] = sorted(found)[len(found) // 2]
            rows.append(row)
    machine = conditions(torch.device(args.device))
    table = Table(title=f'MB of a step, batch {args.batch_size}, float32, {args.device}', caption=str(machine))
    for heading in ('size', 'model', 'inference', 'training'):
        table.add_column(heading, justify='left' if heading == 'model' else 'right')
    for row in rows:
        train = f'{row["train_mb"]:.0f}' if 'train_mb' in row else '-'
        table.add_row(str(row['size']), row['name'], f'{row["inference_mb"]:.0f}', train)
    Console().print(table)
    if args.json:
        write_json(args.json, f'python benchmarks/memory.py {" ".join(sys.argv[1:])}', rows, machine)


if __name__ == '__main__':
    main()
