# SPDX-License-Identifier: Apache-2.0
"""The state fusion on the CPU beside what PyTorch's convolutions need for the same numbers.

They are three depthwise convolutions of dilation 1, 3 and 5 on maps with replicated borders, as Spatial-Mamba trains,
or one of 11x11, mostly zeros, into which it merges them for inference; each on contiguous and on channels-last maps, of
which the better one counts. Shapes are those of the four stages of Spatial-Mamba-T at 224x224, float32.

    python benchmarks/fusion_cpu.py --batch-size 8 --json benchmarks/results/fusion_cpu.json
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _ops import SPATIAL_MAMBA_STAGES, forward, ratios, step
from _run import finish, make_parser, parse
from torch import Tensor

from vssm.ops import state_fusion
from vssm.tools._bench import median_seconds


def three_convolutions(h: Tensor, weight: Tensor) -> Tensor:
    """Fuse states, (batch, E, H, W), as Spatial-Mamba does in training."""
    y = torch.zeros(())
    for kernel, dilation in zip(weight, (1, 3, 5), strict=True):
        padded = F.pad(h, (dilation,) * 4, mode='replicate')
        y = y + F.conv2d(padded, kernel.unsqueeze(1), groups=h.shape[1], dilation=dilation)
    return y


def merged_convolution(h: Tensor, weight: Tensor) -> Tensor:
    """Fuse states, (batch, E, H, W), as Spatial-Mamba does in inference."""
    kernel = h.new_zeros(h.shape[1], 1, 11, 11)
    for w, first, dilation in zip(weight, (4, 2, 0), (1, 3, 5), strict=True):
        kernel[:, 0, first : 11 - first : dilation, first : 11 - first : dilation] += w
    return F.conv2d(F.pad(h, (5,) * 4, mode='replicate'), kernel, groups=h.shape[1])


def measure(batch: int, size: int, dim: int, rounds: int) -> dict[str, Any]:
    h, weight = torch.randn(batch, size, size, dim), torch.randn(3, dim, 3, 3)
    view = h.permute(0, 3, 1, 2)  # [batch, H, W, E] -> [batch, E, H, W]
    ops = {('kernel', ''): (state_fusion, h)}
    for layout, maps in dict(contiguous=view.contiguous(), channels_last=view).items():
        ops['three', layout] = three_convolutions, maps
        ops['merged', layout] = merged_convolution, maps
    forwards, steps = {}, {}
    for name, (op, maps) in ops.items():
        tensors = dict(h=maps, weight=weight)
        forwards[name] = partial(forward, op, tensors)
        steps[name] = partial(step, op, tensors, torch.ones_like(maps))
    row: dict[str, Any] = dict(batch=batch, size=size, dim=dim)
    for what, calls, n in (('forward', forwards, rounds), ('step', steps, max(rounds // 3, 1))):
        seconds = median_seconds(calls, n, warmup=1)
        for name in ('kernel', 'three', 'merged'):
            row[f'{what}_{name}_ms'] = 1e3 * min(s for (op, _), s in seconds.items() if op == name)
    return row


def main() -> None:
    args = parse(make_parser(__doc__, batch_size=8, rounds=9, threads=0))
    rows = [measure(args.batch_size, *stage, args.rounds) for stage in SPATIAL_MAMBA_STAGES]
    title = 'state_fusion on the CPU, float32; step = forward + backward'
    header = ['H=W', 'E', 'forward ms', 'three convs x', 'merged x', 'step ms', 'three convs x', 'merged x']
    cells = [[str(row['size']), str(row['dim']), *ratios(row, 'kernel', ('three', 'merged'))] for row in rows]
    finish(args, rows, title, header, cells)


if __name__ == '__main__':
    main()
