# SPDX-License-Identifier: Apache-2.0
"""Time per pixel of a large image over that of a small one, on the CPU, one image at a time.

python benchmarks/size_cpu.py --json benchmarks/results/size_cpu.json
"""

import argparse
from functools import partial
from pathlib import Path

import timm
import torch
from model_cpu import forward
from rich.console import Console
from rich.table import Table
from timing import conditions, interleaved, write_json

import vssm  # noqa: F401  registers the models

MODELS = ('swin_tiny_patch4_window7_224', 'convnext_tiny', 'vmamba2d_tiny', 'spatial_mamba_tiny')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, help='timm names')
    parser.add_argument('--sizes', type=int, nargs=2, default=(224, 1792), metavar=('SMALL', 'LARGE'))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)

    rows = []
    for name in args.models:
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
        seconds = []
        for size in args.sizes:
            model = timm.create_model(name, **(dict(img_size=size) if fixed else {})).eval()
            call = partial(forward, model, torch.randn(1, 3, size, size))
            seconds.append(interleaved({'': call}, args.rounds if size > 512 else 5 * args.rounds)[''])
        small, large = (s / size**2 for s, size in zip(seconds, args.sizes, strict=True))
        rows.append(dict(name=name, sizes=list(args.sizes), ms=[1e3 * s for s in seconds], per_pixel=large / small))

    small, large = args.sizes
    table = Table(title=f'inference, batch 1, float32: {small}x{small} and {large}x{large}', caption=str(conditions()))
    for heading in ('model', f'{small}, ms', f'{large}, ms', 'time per pixel'):
        table.add_column(heading)
    for row in rows:
        table.add_row(row['name'], *(f'{ms:.0f}' for ms in row['ms']), f'{row["per_pixel"]:.2f}x')
    Console().print(table)
    if args.json:
        write_json(args.json, 'python benchmarks/size_cpu.py', rows)


if __name__ == '__main__':
    main()
