# SPDX-License-Identifier: Apache-2.0
"""The selective scan on the CPU beside its plain-PyTorch reference and beside one ExE linear layer on the same map.

Shapes are those of the four stages of 2DVMamba-T at 224x224: four orders, one state, low-rank steps, float32. "batch 1"
is the throughput with one image over that with a batch.

    python benchmarks/op_cpu.py --batch-size 8 --json benchmarks/results/op_cpu.json
"""

from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from timing import conditions, cpu_parser, interleaved, parse, write_json
from torch import nn

from vssm.ops import selective_scan, selective_scan_ref

STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # (H = W, E)


def scan_inputs(batch: int, size: int, dim: int) -> dict:
    """Inputs as the model makes them: dt, B and C are slices of one projection."""
    K, N, R = 4, 1, -(-dim // 16)
    proj = torch.randn(batch, size, size, K, R + 2 * N) * 0.5
    dt, B, C = proj.split([R, N, N], dim=-1)
    return dict(
        x=torch.randn(batch, size, size, dim),
        dt=dt,
        A=-torch.ones(K, dim, N),
        B=B,
        C=C,
        D=torch.ones(K, dim),
        dt_bias=torch.empty(K, dim).uniform_(-6.9, -2.3),
        dt_weight=torch.empty(K, dim, R).uniform_(-(R**-0.5), R**-0.5),
    )


def forward(scan, inputs: dict, **options) -> None:
    with torch.inference_mode():
        scan(**inputs, **options)


def step(scan, inputs: dict, grad: torch.Tensor, **options) -> None:
    """Forward and backward."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    scan(**leaves, **options).backward(grad)


def main() -> None:
    parser = cpu_parser(__doc__, rounds=15)
    parser.add_argument(
        '--no-reference', action='store_true', help='leave out the reference, which takes most of the time'
    )
    args = parse(parser)

    rows = []
    for size, dim in STAGES:
        inputs = scan_inputs(args.batch_size, size, dim)
        one_image = scan_inputs(1, size, dim)
        grad = torch.randn_like(inputs['x'])
        linear = nn.Linear(dim, dim)
        row = dict(batch=args.batch_size, size=size, dim=dim)
        for what, call in (('forward', forward), ('step', partial(step, grad=grad))):
            seconds = interleaved(
                {
                    'scan_2d': partial(call, selective_scan, inputs),
                    'scan_1d': partial(call, selective_scan, inputs, ndim=1),
                    'linear': partial(call, linear, dict(input=inputs['x'])),
                },
                args.rounds,
            )
            if not args.no_reference:
                seconds |= interleaved({'reference_2d': partial(call, selective_scan_ref, inputs)}, rounds=3, warmup=1)
            row |= {f'{what}_{name}_ms': 1e3 * s for name, s in seconds.items()}
        alone = interleaved(
            {
                'batch': partial(forward, selective_scan, inputs),
                'one_image': partial(forward, selective_scan, one_image),
            },
            args.rounds,
            repeats=5,
        )
        row['one_image_throughput'] = alone['batch'] / args.batch_size / alone['one_image']
        positions = args.batch_size * size * size * dim * 4
        row['forward_ns_per_element'] = 1e6 * row['forward_scan_2d_ms'] / positions
        rows.append(row)

    table = Table(
        title='selective_scan on the CPU, four orders, N = 1, float32; step = forward + backward',
        caption=str(conditions()),
    )
    for heading in (
        'H=W',
        'E',
        'forward ms',
        'ns/element',
        'x Linear',
        '2-D / 1-D',
        'reference x',
        'batch 1',
        'step ms',
        'x Linear step',
        'step / forward',
        'reference x',
    ):
        table.add_column(heading, justify='right')
    for r in rows:

        def over_reference(what, r=r):
            reference = r.get(f'{what}_reference_2d_ms')
            return '-' if reference is None else f'{reference / r[f"{what}_scan_2d_ms"]:.0f}'

        table.add_row(
            str(r['size']),
            str(r['dim']),
            f'{r["forward_scan_2d_ms"]:.2f}',
            f'{r["forward_ns_per_element"]:.2f}',
            f'{r["forward_scan_2d_ms"] / r["forward_linear_ms"]:.2f}',
            f'{r["forward_scan_2d_ms"] / r["forward_scan_1d_ms"]:.2f}',
            over_reference('forward'),
            f'{r["one_image_throughput"]:.2f}',
            f'{r["step_scan_2d_ms"]:.2f}',
            f'{r["step_scan_2d_ms"] / r["step_linear_ms"]:.2f}',
            f'{r["step_scan_2d_ms"] / r["forward_scan_2d_ms"]:.2f}',
            over_reference('step'),
        )
    Console().print(table)
    if args.json:
        write_json(args.json, 'python benchmarks/op_cpu.py', rows)


if __name__ == '__main__':
    main()
