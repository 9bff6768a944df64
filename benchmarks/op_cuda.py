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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _ops import VMAMBA_STAGES, forward, scan_inputs
from _run import NO_TIME, finish, in_time, keep, make_parser, parse_cuda, time_on_device
from torch import Tensor

from vssm.ops import selective_scan, selective_scan_ref

MAPS = ((14, 96, 1), (56, 96, 1), (200, 96, 1), (200, 96, 16))  # (H = W, E, N)
MAPS_OF = ('x', 'dt', 'B', 'C')  # the inputs that a position has; the others are parameters


def prepare_forward(scan: Callable, inputs: dict[str, Tensor], **options: Any) -> Callable[[], Any]:
    return partial(forward, scan, inputs, **options)


def prepare_backward(scan: Callable, inputs: dict[str, Tensor], **options: Any) -> Callable[[], Any]:
    """A call of the backward pass alone, which can be made again and again."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = scan(**leaves, **options)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)


PASSES = dict(forward=prepare_forward, backward=prepare_backward)


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that makes the calls in turn, one at a time."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def moved_bytes(inputs: dict[str, Tensor], what: str) -> int:
    """The bytes that have to be read and written at least."""
    maps = sum(inputs[name].nbytes for name in MAPS_OF)
    # Forward inputs and y; backward inputs and their gradients, and the gradient of y.
    return (maps if what == 'forward' else 2 * maps) + inputs['x'].nbytes


def copy_bandwidth(args: argparse.Namespace) -> float:
    """Bytes a second that a copy of a large tensor moves, read and written."""
    source = torch.empty(1 << 10 if args.dry_run else 1 << 28, device=args.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_on_device(args, {'copy': partial(target.copy_, source)}, repeats=10)['copy']


def copies(inputs: dict[str, Tensor], args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """As many copies of the inputs as exceed the card's cache."""
    cache = 0 if args.dry_run else torch.cuda.get_device_properties(0).L2_cache_size
    count = 1 + min(31, 4 * cache // moved_bytes(inputs, 'forward'))
    return [{name: t.clone() for name, t in inputs.items()} for _ in range(count)]


def measure(
    args: argparse.Namespace, bandwidth: float, dtype: str, batch: int, size: int, dim: int, N: int
) -> dict[str, Any]:
    if args.dry_run:
        batch, size, dim, N = 1, min(size, 8), min(dim, 32), min(N, 2)
    sets = copies(scan_inputs(batch, size, dim, N, getattr(torch, dtype), args.device), args)
    row: dict[str, Any] = dict(dtype=dtype, batch=batch, size=size, dim=dim, states=N, copy_gb_per_s=bandwidth / 1e9)
    for what, prepare in PASSES.items():
        calls = {
            '2d': in_turn([prepare(selective_scan, inputs) for inputs in sets]),
            '1d': in_turn([prepare(selective_scan, inputs, ndim=1) for inputs in sets]),
        }
        if batch == 1 and not args.no_reference:
            calls['reference'] = in_turn([prepare(selective_scan_ref, inputs) for inputs in sets[:2]])
        seconds = time_on_device(args, calls, repeats=10)
        row |= {f'{what}_{name}_ms': 1e3 * s for name, s in seconds.items()}
        row[f'{what}_of_copy'] = moved_bytes(sets[0], what) / seconds['2d'] / bandwidth
    return row


def cells_of(row: dict[str, Any]) -> list[str]:
    cells = [str(row[key]) for key in ('dtype', 'batch', 'size', 'dim', 'states')]
    for what in PASSES:
        ms, reference = row[f'{what}_2d_ms'], row.get(f'{what}_reference_ms')
        cells += [
            f'{ms:.3f}',
            f'{row[f"{what}_of_copy"]:.0%}',
            f'{ms / row[f"{what}_1d_ms"]:.2f}',
            f'{reference / ms:.0f}' if reference else '-',
        ]
    return cells


def main() -> None:
    parser = make_parser(__doc__, batch_size=128, rounds=15, limit=3600)
    parser.add_argument('--dtypes', nargs='*', default=['float32', 'bfloat16'])
    parser.add_argument('--no-reference', action='store_true', help='leave out the reference')
    args = parse_cuda(parser)
    bandwidth = copy_bandwidth(args)
    stages, maps = [(args.batch_size, *stage, 1) for stage in VMAMBA_STAGES], [(1, *shape) for shape in MAPS]
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for dtype, shape in itertools.chain(itertools.product(args.dtypes, stages), itertools.product(args.dtypes, maps)):
        if not in_time(args):
            left_out[' '.join(map(str, (dtype, *shape)))] = NO_TIME
            continue
        rows.append(measure(args, bandwidth, dtype, *shape))
        if not args.dry_run:
            keep(args, rows, 'cuda', left_out)
    if args.dry_run:
        return print(f'dry run: {len(rows)} shapes, forward and backward, nothing timed')
    header = ['dtype', 'batch', 'H=W', 'E', 'N']
    for what in PASSES:
        header += [f'{what} ms', 'of copy', '2-D / 1-D', 'reference x']
    finish(args, rows, 'selective_scan on CUDA, four orders', header, [cells_of(row) for row in rows], 'cuda', left_out)


if __name__ == '__main__':
    main()
