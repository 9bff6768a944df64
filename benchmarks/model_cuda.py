# SPDX-License-Identifier: Apache-2.0
"""Images per second and peak memory of whole models on a GPU in bfloat16, interleaved in one process.

Each model runs on contiguous and on channels-last input, and its better one counts: inference and training steps
(forward and backward), eager, or compiled with `--compile`. Then the time per pixel of one large image against a batch
of small ones.

    python benchmarks/model_cuda.py --json benchmarks/results/model_cuda.json

Without a GPU, `--dry-run` makes every call once on the CPU, with small images, and times nothing.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _models import LAYOUTS, MODELS, better_layout, forward, make, step
from _run import finish, make_parser, parse_cuda, time_on_device

from vssm.tools._memory import free_memory

STEPS = dict(inference=forward, train=step)


def prepare(args: argparse.Namespace, what: str, name: str, layout: str, size: int, batch: int) -> Callable[[], None]:
    """A step of a model on the device."""
    model, images = make(name, size, batch, what == 'train', layout, args.device)
    if args.compile:
        model = torch.compile(model, fullgraph=True, dynamic=False)
    return partial(STEPS[what], model, images, bfloat16=True)


def forget() -> None:
    """Free what earlier models have left: compiled code, and memory."""
    torch._dynamo.reset()
    free_memory()


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """The most that the allocator holds during a call, parameters and inputs included."""
    call()  # compiles and tunes
    if device == 'cpu':
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure_steps(args: argparse.Namespace, what: str, rows: list[dict[str, Any]]) -> None:
    """Add speed and memory of a step to the rows of all models, which take turns for the speed."""
    size, batch = args.size, args.batch_size
    calls = {
        (name, layout): prepare(args, what, name, layout, size, batch) for name in args.models for layout in LAYOUTS
    }
    seconds = time_on_device(args, calls)
    del calls
    for row in rows:
        layout = better_layout(row['name'], seconds)
        row[f'{what}_layout'] = layout
        row[f'{what}_images_per_s'] = batch / seconds[row['name'], layout]
        forget()  # so that the model is alone on the device
        row[f'{what}_peak_mb'] = peak_bytes(prepare(args, what, row['name'], layout, size, batch), args.device) / 1e6


def measure_large(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Add the time per pixel of a large image over that of small ones to a model's row."""
    forget()
    shapes = dict(large=(args.large, 1), small=(args.size, min(16, args.batch_size)))
    seconds = time_on_device(
        args,
        {
            which: prepare(args, 'inference', row['name'], row['inference_layout'], *shape)
            for which, shape in shapes.items()
        },
    )
    per_pixel = {which: seconds[which] / (size * size * batch) for which, (size, batch) in shapes.items()}
    row['large_per_pixel'] = per_pixel['large'] / per_pixel['small']


def main() -> None:
    parser = make_parser(__doc__, MODELS, batch_size=128, rounds=9)
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--large', type=int, default=1024, help='side of the one large image')
    parser.add_argument('--compile', action='store_true', help='torch.compile the models')
    args = parse_cuda(parser)
    if args.dry_run:
        args.batch_size, args.large, args.rounds = 1, args.size, 1
    torch._dynamo.config.recompile_limit = 64  # the models share code, which is compiled for each of them

    rows: list[dict[str, Any]] = [dict(vars(args), json=None, models=None, name=name) for name in args.models]
    for what in STEPS:
        measure_steps(args, what, rows)
    for row in rows:
        measure_large(args, row)
    if args.dry_run:
        return print(f'dry run: {len(rows)} models, inference and training, nothing timed')
    cells = [
        [
            row['name'],
            f'{row["inference_images_per_s"]:.0f}',
            f'{row["inference_images_per_s"] / rows[0]["inference_images_per_s"]:.2f}',
            f'{row["train_images_per_s"]:.0f}',
            f'{row["train_images_per_s"] / rows[0]["train_images_per_s"]:.2f}',
            f'{row["train_peak_mb"]:.0f}',
            f'{row["large_per_pixel"]:.2f}',
        ]
        for row in rows
    ]
    ratio = f'x {args.models[0]}'
    header = ['model', 'images/s', ratio, 'training images/s', ratio, 'training MB', f'{args.large}^2 per pixel']
    how = 'compiled' if args.compile else 'eager'
    title = f'batch {args.batch_size}, {args.size}x{args.size}, bfloat16 autocast, {how}'
    finish(args, rows, title, header, cells, 'cuda')


if __name__ == '__main__':
    main()
