# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of 2DMambaMIL on one big slide, forward and backward, in a process of its own.

    python benchmarks/slide_memory.py --json benchmarks/results/slide_memory.json

The memory is all that the process holds at its peak, in GB of 10^9 bytes: Python, PyTorch and the slide's features too.
The slowest and the biggest of several processes count.
"""

import argparse
import json
import time

import torch
from _run import finish, make_parser, parse, run_alone

from vssm.models import create_mil_model
from vssm.tools._memory import peak_resident_bytes

NETWORKS = {
    'learned pad token': dict(pad_token='learned'),
    'no pad token': dict(pad_token='none'),
    'learned pad token, cropped': dict(pad_token='learned', crop=True),
}


def measure(name: str, grid: int, tissue: float, in_dim: int) -> dict[str, float]:
    """Figures of one step on a square grid whose middle is tissue."""
    side = round(grid * tissue**0.5)
    first = (grid - side) // 2
    rows = torch.arange(first, first + side)
    y, x = torch.meshgrid(rows, rows, indexing='ij')
    coords = 512 * torch.stack([x.flatten(), y.flatten()], 1)
    features = torch.randn(len(coords), in_dim)
    size = {} if 'crop' in NETWORKS[name] else dict(grid_size=(grid, grid))
    model = create_mil_model('mamba2d_mil', in_dim=in_dim, **size, **NETWORKS[name])
    start = time.perf_counter()
    logits = model(features, coords)
    forward = time.perf_counter() - start
    logits.logsumexp(1).sum().backward()
    step = time.perf_counter() - start
    return dict(patches=len(coords), forward_s=forward, step_s=step, peak_gb=peak_resident_bytes() / 1e9)


def main() -> None:
    parser = make_parser(__doc__, rounds=3, threads=2)
    parser.add_argument('--grid', type=int, default=400, help='height and width in cells')
    parser.add_argument('--tissue', type=float, nargs='+', default=[1.0, 0.25], help='shares of the grid with patches')
    parser.add_argument('--in-dim', type=int, default=1024, help='width of the features')
    parser.add_argument('--one', nargs=2, metavar=('NAME', 'SHARE'), help=argparse.SUPPRESS)  # what such a process does
    args = parse(parser)
    if args.one:
        print(json.dumps(measure(args.one[0], args.grid, float(args.one[1]), args.in_dim)))
        return

    rows = []
    for tissue in args.tissue:
        for name in NETWORKS:
            options = ['--grid', args.grid, '--in-dim', args.in_dim, '--threads', args.threads, '--one', name, tissue]
            found = [json.loads(run_alone(*options)) for _ in range(args.rounds)]
            rows.append(dict(name=name, tissue=tissue) | {key: max(f[key] for f in found) for key in found[0]})
    cells = [
        [
            row['name'],
            f'{row["tissue"]:.0%}',
            str(row['patches']),
            *(f'{row[key]:.1f} s' for key in ('forward_s', 'step_s')),
            f'{row["peak_gb"]:.2f} GB',
        ]
        for row in rows
    ]
    title = f'{args.grid} x {args.grid} cells, 128 channels, E = 256, N = 16, forward and backward'
    finish(args, rows, title, ['network', 'tissue', 'patches', 'forward', 'step', 'peak'], cells)


if __name__ == '__main__':
    main()
