# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of 2DMambaMIL on one big slide, forward and backward, in a process of its own.

    python benchmarks/slide_memory.py --json benchmarks/results/slide_memory.json

The memory is all that the process holds at its peak: Python, PyTorch and the slide's features too.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import conditions, write_json

from vssm.models.mil import create_mil_model

NETWORKS = {
    'learned pad token': dict(pad_token='learned'),
    'no pad token': dict(pad_token='none'),
    'learned pad token, cropped': dict(pad_token='learned', crop=True),
}


def measure(name: str, grid: int, tissue: float, in_dim: int) -> dict[str, float]:
    """Seconds and GB, of 10^9 bytes, of one step on a square grid whose middle is tissue."""
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
    # Of this process, Linux's own figure; getrusage would count what the parent held before the fork.
    peak = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    return dict(patches=len(coords), forward_s=forward, step_s=step, peak_gb=int(peak.split()[1]) * 1024 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--grid', type=int, default=400, help='height and width in cells')
    parser.add_argument('--tissue', type=float, nargs='+', default=[1.0, 0.25], help='shares of the grid with patches')
    parser.add_argument('--in-dim', type=int, default=1024, help='width of the features')
    parser.add_argument('--rounds', type=int, default=3, help='processes; the slowest and the biggest count')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--one', nargs=2, metavar=('NAME', 'SHARE'), help=argparse.SUPPRESS)  # such a process
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one[0], args.grid, float(args.one[1]), args.in_dim)))
        return

    rows = []
    for tissue in args.tissue:
        for name in NETWORKS:
            options = ['--grid', args.grid, '--in-dim', args.in_dim, '--threads', args.threads, '--one', name, tissue]
            command = [sys.executable, __file__, *map(str, options)]
            found = [json.loads(subprocess.check_output(command, text=True)) for _ in range(args.rounds)]
            rows.append(dict(name=name, tissue=tissue) | {key: max(f[key] for f in found) for key in found[0]})
    title = f'{args.grid} x {args.grid} cells, 128 channels, E = 256, N = 16, forward and backward'
    table = Table(title=title, caption=str(conditions()))
    for heading in ('network', 'tissue', 'patches', 'forward', 'step', 'peak'):
        table.add_column(heading, justify='left' if heading == 'network' else 'right')
    for row in rows:
        times = [f'{row[key]:.1f} s' for key in ('forward_s', 'step_s')]
        table.add_row(row['name'], f'{row["tissue"]:.0%}', str(row['patches']), *times, f'{row["peak_gb"]:.2f} GB')
    Console().print(table)
    if args.json:
        write_json(args.json, f'python benchmarks/slide_memory.py {" ".join(sys.argv[1:])}', rows)


if __name__ == '__main__':
    main()
