# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's gated readout on the CPU, in one pass, beside the five operations of PyTorch that it stands for.

Shapes are those of the four stages of Spatial-Mamba-T at 224x224, float32.

    python benchmarks/readout_cpu.py --batch-size 8 --json benchmarks/results/readout_cpu.json
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _ops import SPATIAL_MAMBA_STAGES, forward, ratios, step
from _run import finish, make_parser, parse
from torch import Tensor

from vssm.ops import gated_readout
from vssm.tools._bench import median_seconds


def operations(
    h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    return F.layer_norm(torch.addcmul(D * x, C, h), D.shape, weight, bias, eps) * F.silu(z)


def measure(batch: int, size: int, dim: int, rounds: int) -> dict[str, Any]:
    h, x, z = torch.randn(3, batch, size, size, dim)
    D, weight, bias = torch.randn(3, dim)
    tensors = dict(h=h, x=x, C=torch.randn(batch, size, size, 1), D=D, z=z, weight=weight, bias=bias)
    row: dict[str, Any] = dict(batch=batch, size=size, dim=dim)
    for what, call in (('forward', forward), ('step', partial(step, grad=h))):
        calls = {
            'kernel': partial(call, gated_readout, tensors, eps=1e-5),
            'operations': partial(call, operations, tensors, eps=1e-5),
        }
        row |= {f'{what}_{name}_ms': 1e3 * s for name, s in median_seconds(calls, rounds).items()}
    return row


def main() -> None:
    args = parse(make_parser(__doc__, batch_size=8, rounds=15, threads=0))
    rows = [measure(args.batch_size, *stage, args.rounds) for stage in SPATIAL_MAMBA_STAGES]
    title = 'gated readout on the CPU, float32; step = forward + backward'
    header = ['H=W', 'E', 'forward ms', 'operations x', 'step ms', 'operations x']
    cells = [[str(row['size']), str(row['dim']), *ratios(row, 'kernel', ['operations'])] for row in rows]
    finish(args, rows, title, header, cells)


if __name__ == '__main__':
    main()
