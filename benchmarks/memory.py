# SPDX-License-Identifier: Apache-2.0
"""Peak memory of inference and of a training step against the image's size, beside the weights.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json
    python benchmarks/memory.py --sizes 2048 --inference --json benchmarks/results/memory_cpu_2048.json

Each figure comes from a process of its own: on the CPU the growth of its resident size, on a GPU that of what PyTorch's
allocator holds. It is the median of several processes, in MB of 10^6 bytes.
"""

import argparse
import statistics
from functools import partial

import torch
from _models import MODELS, forward, make, step
from _run import finish, make_parser, parse, run_alone

from vssm.tools._memory import NO_PEAK, peak_growth


def measure(name: str, what: str, args: argparse.Namespace) -> float:
    """MB that one step needs besides weights and images, in training with the gradients."""
    train = what == 'train'
    model, images = make(name, args.sizes[0], args.batch_size, train, device=args.device)
    call = partial(step if train else forward, model, images)
    call()
    model.zero_grad()
    growth = peak_growth(call, torch.device(args.device))
    if growth is None:
        raise SystemExit(NO_PEAK)
    return growth / 1e6


def main() -> None:
    parser = make_parser(__doc__, MODELS, batch_size=1, rounds=3)
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 384, 512, 768], help='sides of the image')
    parser.add_argument('--inference', action='store_true', help='leave out the training step')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--one', nargs=2, metavar=('NAME', 'STEP'), help=argparse.SUPPRESS)  # what such a process does
    args = parse(parser)
    if args.one:
        print(measure(*args.one, args))
        return

    rows = []
    for size in args.sizes:
        for name in args.models:
            row = dict(name=name, size=size)
            for what in ('inference',) if args.inference else ('inference', 'train'):
                options = ['--sizes', size, '--batch-size', args.batch_size, '--device', args.device]
                found = [float(run_alone(*options, '--one', name, what)) for _ in range(args.rounds)]
                row[f'{what}_mb'] = statistics.median_high(found)
            rows.append(row)
    cells = [
        [str(row['size']), row['name'], *(f'{row[key]:.0f}' if key in row else '-' for key in KEYS)] for row in rows
    ]
    title = f'MB of a step, batch {args.batch_size}, float32, {args.device}'
    finish(args, rows, title, ['size', 'model', 'inference', 'training'], cells, args.device)


KEYS = ('inference_mb', 'train_mb')

if __name__ == '__main__':
    main()
