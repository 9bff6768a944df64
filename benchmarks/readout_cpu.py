# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's gated readout on the CPU, in one pass, beside the five operations of PyTorch that it stands for.

Shapes are those of the four stages of Spatial-Mamba-T at 224x224, float32.

    python benchmarks/readout_cpu.py --batch-size 8 --json benchmarks/results/readout_cpu.json
"""

from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import conditions, cpu_parser, interleaved, parse, write_json

from vssm.ops import gated_readout

STAGES = ((56, 128), (28, 256), (14, 512), (7, 1024))  # (H = W, E)


def operations(h, x, C, D, z, weight, bias, eps):
    return F.layer_norm(torch.addcmul(D * x, C, h), D.shape, weight, bias, eps) * F.silu(z)


def forward(op, tensors) -> None:
    with torch.inference_mode():
        op(*tensors, 1e-5)


def step(op, tensors) -> None:
    """Forward and backward."""
    y = op(*(t.detach().requires_grad_() for t in tensors), 1e-5)
    y.backward(tensors[0])


def main() -> None:
    args = parse(cpu_parser(__doc__, rounds=15))

    rows = []
    for size, dim in STAGES:
        shape = (args.batch_size, size, size, dim)
        h, x, z = torch.randn(3, *shape)
        D, weight, bias = torch.randn(3, dim)
        tensors = (h, x, torch.randn(*shape[:3], 1), D, z, weight, bias)
        row = dict(batch=args.batch_size, size=size, dim=dim)
        for what, call in (('forward', forward), ('step', step)):
            calls = dict(kernel=partial(call, gated_readout, tensors), operations=partial(call, operations, tensors))
            row.update({f'{what}_{name}_ms': 1e3 * s for name, s in interleaved(calls, args.rounds).items()})
        rows.append(row)

    table = Table(title='gated readout on the CPU, float32; step = forward + backward', caption=str(conditions()))
    for heading in ('H=W', 'E', 'forward ms', 'operations x', 'step ms', 'operations x'):
        table.add_column(heading, justify='right')
    for r in rows:
        cells = [str(r['size']), str(r['dim'])]
        for what in ('forward', 'step'):
            kernel = r[f'{what}_kernel_ms']
            cells += [f'{kernel:.2f}', f'{r[f"{what}_operations_ms"] / kernel:.1f}']
        table.add_row(*cells)
    Console().print(table)
    if args.json:
        write_json(args.json, 'python benchmarks/readout_cpu.py', rows)


if __name__ == '__main__':
    main()
