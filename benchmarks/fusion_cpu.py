# SPDX-License-Identifier: Apache-2.0
"""The state fusion on the CPU beside what PyTorch's convolutions need for the same numbers.

They are three depthwise convolutions of dilation 1, 3 and 5 on maps with replicated borders, as Spatial-Mamba trains,
or one of 11x11, mostly zeros, into which it merges them for inference; each on contiguous and on channels-last maps, of
which the better one counts. Shapes are those of the four stages of Spatial-Mamba-T at 224x224, float32.

    python benchmarks/fusion_cpu.py --batch-size 8 --json benchmarks/results/fusion_cpu.json
"""

from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import conditions, cpu_parser, interleaved, parse, write_json

from vssm.ops import state_fusion

STAGES = ((56, 128), (28, 256), (14, 512), (7, 1024))  # (H = W, E)


def three_convolutions(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """On h of (batch, E, H, W)."""
    y = 0
    for kernel, dilation in zip(weight, (1, 3, 5), strict=True):
        padded = F.pad(h, (dilation,) * 4, mode='replicate')
        y = y + F.conv2d(padded, kernel.unsqueeze(1), groups=h.shape[1], dilation=dilation)
    return y


def merged_convolution(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """On h of (batch, E, H, W)."""
    kernel = h.new_zeros(h.shape[1], 1, 11, 11)
    for w, first, step in zip(weight, (4, 2, 0), (1, 3, 5), strict=True):
        kernel[:, 0, first : 11 - first : step, first : 11 - first : step] += w
    return F.conv2d(F.pad(h, (5,) * 4, mode='replicate'), kernel, groups=h.shape[1])


def forward(fuse, h: torch.Tensor, weight: torch.Tensor) -> None:
    with torch.inference_mode():
        fuse(h, weight)


def step(fuse, h: torch.Tensor, weight: torch.Tensor) -> None:
    """Forward and backward."""
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    y = fuse(h, weight)
    y.backward(torch.ones_like(y))


def main() -> None:
    args = parse(cpu_parser(__doc__, rounds=9))

    rows = []
    for size, dim in STAGES:
        h, weight = torch.randn(args.batch_size, size, size, dim), torch.randn(3, dim, 3, 3)
        layouts = dict(contiguous=h.permute(0, 3, 1, 2).contiguous(), channels_last=h.permute(0, 3, 1, 2))
        row = dict(batch=args.batch_size, size=size, dim=dim)
        for what, call in (('forward', forward), ('step', step)):
            calls = {('kernel', ''): partial(call, state_fusion, h, weight)}
            for layout, nchw in layouts.items():
                calls['three', layout] = partial(call, three_convolutions, nchw, weight)
                calls['merged', layout] = partial(call, merged_convolution, nchw, weight)
            seconds = interleaved(calls, args.rounds if what == 'forward' else max(args.rounds // 3, 1), warmup=1)
            for name in ('kernel', 'three', 'merged'):
                row[f'{what}_{name}_ms'] = 1e3 * min(s for (n, _), s in seconds.items() if n == name)
        rows.append(row)

    table = Table(title='state_fusion on the CPU, float32; step = forward + backward', caption=str(conditions()))
    for heading in ('H=W', 'E', 'forward ms', 'three convs x', 'merged x', 'step ms', 'three convs x', 'merged x'):
        table.add_column(heading, justify='right')
    for r in rows:
        cells = [str(r['size']), str(r['dim'])]
        for what in ('forward', 'step'):
            kernel = r[f'{what}_kernel_ms']
            cells += [f'{kernel:.2f}', *(f'{r[f"{what}_{name}_ms"] / kernel:.1f}' for name in ('three', 'merged'))]
        table.add_row(*cells)
    Console().print(table)
    if args.json:
        write_json(args.json, 'python benchmarks/fusion_cpu.py', rows)


if __name__ == '__main__':
    main()
