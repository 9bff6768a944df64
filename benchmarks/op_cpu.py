# SPDX-License-Identifier: Apache-2.0
"""The selective scan on the CPU beside its plain-PyTorch reference and beside one ExE linear layer on the same map.

Shapes are those of the four stages of 2DVMamba-T at 224x224: four orders, one state, low-rank steps. Maps and the
linear layer are in `--dtype`, the scan's parameters in float32. "batch 1" is the throughput with one image over that
with a batch. The second table is of one order at E = 384 with 1, 8 and 16 states, on a map of 14x14 and on sequences
and windows of tokens, a map of one row: the shapes of Vim and MambaVision.

    python benchmarks/op_cpu.py --batch-size 8 --json benchmarks/results/op_cpu.json
"""

from functools import partial
from typing import Any

import torch
from _ops import TOKEN_MAPS, TOKEN_STATES, VMAMBA_STAGES, forward, scan_inputs, step
from _run import finish, make_parser, parse
from torch import nn

from vssm.ops import selective_scan, selective_scan_ref
from vssm.tools._bench import median_seconds
from vssm.tools._tables import print_table


def measure(batch: int, size: int, dim: int, rounds: int, with_reference: bool, dtype: torch.dtype) -> dict[str, Any]:
    inputs, one_image = (scan_inputs(images, size, dim, dtype=dtype) for images in (batch, 1))
    grad = torch.randn_like(inputs['x'])
    linear = nn.Linear(dim, dim, dtype=dtype)
    row: dict[str, Any] = dict(batch=batch, size=size, dim=dim)
    for what, call in (('forward', forward), ('step', partial(step, grad=grad))):
        calls = {
            'scan_2d': partial(call, selective_scan, inputs),
            'scan_1d': partial(call, selective_scan, inputs, ndim=1),
            'linear': partial(call, linear, dict(input=inputs['x'])),
        }
        seconds = median_seconds(calls, rounds)
        if with_reference:
            calls = {'reference_2d': partial(call, selective_scan_ref, inputs)}
            seconds |= median_seconds(calls, rounds=3, warmup=1)
        row |= {f'{what}_{name}_ms': 1e3 * s for name, s in seconds.items()}
    calls = dict(batch=partial(forward, selective_scan, inputs), one_image=partial(forward, selective_scan, one_image))
    alone = median_seconds(calls, rounds, repeats=5)
    row['one_image_throughput'] = alone['batch'] / batch / alone['one_image']
    row['forward_ns_per_element'] = 1e6 * row['forward_scan_2d_ms'] / (batch * size * size * dim * 4)
    return row


def measure_states(
    batch: int, height: int, width: int, rounds: int, dtype: torch.dtype, dim: int = 384
) -> dict[str, Any]:
    """Times of the 1-D scan in one order with each number of states, and of the linear layer, in turns."""
    inputs = {N: scan_inputs(batch, (height, width), dim, N, dtype, K=1) for N in TOKEN_STATES}
    x = inputs[1]['x']
    grad, linear = torch.randn_like(x), nn.Linear(dim, dim, dtype=dtype)
    row: dict[str, Any] = dict(batch=batch, height=height, width=width, dim=dim)
    for what, call in (('forward', forward), ('step', partial(step, grad=grad))):
        calls = {f'{N}_states': partial(call, selective_scan, inputs[N], ndim=1, orders=(0,)) for N in TOKEN_STATES}
        calls['linear'] = partial(call, linear, dict(input=x))
        row |= {f'{what}_{name}_ms': 1e3 * s for name, s in median_seconds(calls, rounds, repeats=3).items()}
    return row


def state_cells(row: dict[str, Any]) -> list[str]:
    cells = [f'{row["height"]}x{row["width"]}']
    for what in ('forward', 'step'):
        one = row[f'{what}_1_states_ms']
        cells += [f'{one:.2f}', *(f'{row[f"{what}_{N}_states_ms"] / one:.2f}' for N in TOKEN_STATES[1:])]
        cells.append(f'{row[f"{what}_16_states_ms"] / row[f"{what}_linear_ms"]:.2f}')
    return cells


COLUMNS = {  # functions from a row to a cell, by the column's heading
    'H=W': lambda r: str(r['size']),
    'E': lambda r: str(r['dim']),
    'forward ms': lambda r: f'{r["forward_scan_2d_ms"]:.2f}',
    'ns/element': lambda r: f'{r["forward_ns_per_element"]:.2f}',
    'x Linear': lambda r: f'{r["forward_scan_2d_ms"] / r["forward_linear_ms"]:.2f}',
    '2-D / 1-D': lambda r: f'{r["forward_scan_2d_ms"] / r["forward_scan_1d_ms"]:.2f}',
    'reference x': lambda r: over_reference(r, 'forward'),
    'batch 1': lambda r: f'{r["one_image_throughput"]:.2f}',
    'step ms': lambda r: f'{r["step_scan_2d_ms"]:.2f}',
    'x Linear step': lambda r: f'{r["step_scan_2d_ms"] / r["step_linear_ms"]:.2f}',
    'step / forward': lambda r: f'{r["step_scan_2d_ms"] / r["forward_scan_2d_ms"]:.2f}',
    'reference x step': lambda r: over_reference(r, 'step'),
}

STATE_COLUMNS = [
    'map',
    *(f'{what}{cell}' for what in ('', 'step ') for cell in ('N = 1 ms', '8 / 1', '16 / 1', '16 / Linear')),
]


def over_reference(row: dict[str, Any], what: str) -> str:
    reference = row.get(f'{what}_reference_2d_ms')
    return '-' if reference is None else f'{reference / row[f"{what}_scan_2d_ms"]:.0f}'


def main() -> None:
    parser = make_parser(__doc__, batch_size=8, rounds=15, threads=0)
    parser.add_argument(
        '--no-reference', action='store_true', help='leave out the reference, which takes most of the time'
    )
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='of the maps')
    args = parse(parser)
    dtype = getattr(torch, args.dtype)
    rows = [measure(args.batch_size, *stage, args.rounds, not args.no_reference, dtype) for stage in VMAMBA_STAGES]
    by_states = [measure_states(args.batch_size, *grid, args.rounds, dtype) for grid in TOKEN_MAPS]
    title = f'selective_scan on the CPU, four orders, N = 1, {args.dtype}; step = forward + backward'
    print_table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows], title)
    title = 'one order, 1-D, E = 384: with one state in ms, with more over that'
    finish(args, rows + by_states, title, STATE_COLUMNS, [state_cells(row) for row in by_states])


if __name__ == '__main__':
    main()
