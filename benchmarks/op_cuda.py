# SPDX-License-Identifier: Apache-2.0
"""The selective scan on a GPU: beside the bandwidth of a copy, the 1-D scan, and its plain-PyTorch reference.

Shapes are those of the four stages of 2DVMamba-T at 224x224 (four orders, one state, low-rank steps), and the maps of
the 2DMamba paper's own comparison, 14x14, 56x56 and 200x200, once with 16 states. The bytes that must move: each input
and each output once, and in the backward pass the gradient of the output too. Calls go in turn to as many copies of the
inputs as exceed the card's cache. Times are those of calls from Python: on a single small map, of the launches.

    python benchmarks/op_cuda.py --json benchmarks/results/op_cuda.json

Without a GPU, `--dry-run` makes every call once on the CPU, on small maps, and times nothing.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import conditions, interleaved, write_json

from vssm.ops import selective_scan, selective_scan_ref

STAGES = ((56, 96, 1), (28, 192, 1), (14, 384, 1), (7, 768, 1))  # (H = W, E, N)
MAPS = ((14, 96, 1), (56, 96, 1), (200, 96, 1), (200, 96, 16))
MAPS_OF = ('x', 'dt', 'B', 'C')  # the inputs that a position has; the others are parameters, in float32


def scan_inputs(batch: int, size: int, dim: int, N: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Inputs as the model makes them: dt, B and C are slices of one projection."""
    K, R = 4, -(-dim // 16)
    proj = torch.randn(batch, size, size, K, R + 2 * N, dtype=dtype, device=device) * 0.5
    dt, B, C = proj.split([R, N, N], dim=-1)
    return dict(
        x=torch.randn(batch, size, size, dim, dtype=dtype, device=device),
        dt=dt,
        A=-torch.ones(K, dim, N, device=device),
        B=B,
        C=C,
        D=torch.ones(K, dim, device=device),
        dt_bias=torch.empty(K, dim, device=device).uniform_(-6.9, -2.3),
        dt_weight=torch.empty(K, dim, R, device=device).uniform_(-(R**-0.5), R**-0.5),
    )


def prepare_forward(scan: Callable, inputs: dict[str, torch.Tensor], **options) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            scan(**inputs, **options)

    return call


def prepare_backward(scan: Callable, inputs: dict[str, torch.Tensor], **options) -> Callable[[], Any]:
    """A call of the backward pass alone, as often as one likes."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = scan(**leaves, **options)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One of them a time."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def moved_bytes(inputs: dict[str, torch.Tensor], backward: bool) -> int:
    """What has to be read and written at least."""
    size = {name: t.numel() * t.element_size() for name, t in inputs.items()}
    maps = sum(size[name] for name in MAPS_OF)
    return 2 * maps + size['x'] if backward else maps + size['x']  # inputs and their gradients, dy; inputs and y


def copy_bandwidth(device: str, synchronize: Callable, rounds: int, size: int) -> float:
    """Bytes a second that a copy of a large tensor moves, read and written."""
    source = torch.empty(size, device=device)
    target = torch.empty_like(source)
    calls = {'copy': partial(target.copy_, source)}
    return 8 * size / interleaved(calls, rounds, synchronize=synchronize, repeats=10)['copy']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=128, help='of the stages; the maps have a single image')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--dtypes', nargs='*', default=['float32', 'bfloat16'])
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error('needs a CUDA GPU, and PyTorch finds none; --dry-run goes without')
    device = 'cpu' if args.dry_run else 'cuda'
    synchronize = (lambda: None) if args.dry_run else torch.cuda.synchronize
    rounds = 0 if args.dry_run else args.rounds
    time: Callable = partial(
        interleaved, rounds=max(1, rounds), warmup=0 if args.dry_run else 3, synchronize=synchronize
    )
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device, synchronize, max(1, rounds), 1 << 10 if args.dry_run else 1 << 28)

    cache = 0 if args.dry_run else torch.cuda.get_device_properties(0).L2_cache_size

    rows = []
    shapes = [(args.batch_size, *stage) for stage in STAGES] + [(1, *shape) for shape in MAPS]
    for dtype in args.dtypes:
        for batch, size, dim, N in shapes:
            if args.dry_run:
                batch, size, dim, N = 1, min(size, 8), min(dim, 32), min(N, 2)
            sets = [scan_inputs(batch, size, dim, N, getattr(torch, dtype), device)]
            sets *= 1 + min(31, 4 * cache // moved_bytes(sets[0], False))
            sets = [{name: t.clone() for name, t in inputs.items()} for inputs in sets]
            row = dict(dtype=dtype, batch=batch, size=size, dim=dim, states=N, copy_gb_per_s=bandwidth / 1e9)
            for what, prepare in (('forward', prepare_forward), ('backward', prepare_backward)):
                calls = {
                    '2d': in_turn([prepare(selective_scan, inputs) for inputs in sets]),
                    '1d': in_turn([prepare(selective_scan, inputs, ndim=1) for inputs in sets]),
                }
                if batch == 1:
                    calls['reference'] = in_turn([prepare(selective_scan_ref, inputs) for inputs in sets[:2]])
                seconds = time(calls, repeats=1 if args.dry_run else 10)
                row |= {f'{what}_{name}_ms': 1e3 * s for name, s in seconds.items()}
                row[f'{what}_of_copy'] = moved_bytes(sets[0], what == 'backward') / seconds['2d'] / bandwidth
            rows.append(row)

    if args.dry_run:
        return print(f'dry run: {len(rows)} shapes, forward and backward, nothing timed')
    table = Table(title='selective_scan on CUDA, four orders', caption=str(conditions('cuda')))
    for heading in (
        'dtype',
        'batch',
        'H=W',
        'E',
        'N',
        'forward ms',
        'of copy',
        '2-D / 1-D',
        'reference x',
        'backward ms',
        'of copy',
        '2-D / 1-D',
        'reference x',
    ):
        table.add_column(heading, justify='right')
    for r in rows:
        cells = [r['dtype'], r['batch'], r['size'], r['dim'], r['states']]
        for what in ('forward', 'backward'):
            ms = r[f'{what}_2d_ms']
            reference: float | None = r.get(f'{what}_reference_ms')
            cells += [
                f'{ms:.3f}',
                f'{r[f"{what}_of_copy"]:.0%}',
                f'{ms / r[f"{what}_1d_ms"]:.2f}',
                f'{reference / ms:.0f}' if reference else '-',
            ]
        table.add_row(*map(str, cells))
    Console().print(table)
    if args.json:
        write_json(args.json, ' '.join(['python', 'benchmarks/op_cuda.py', *sys.argv[1:]]), rows, conditions('cuda'))


if __name__ == '__main__':
    main()
