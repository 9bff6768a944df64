# SPDX-License-Identifier: Apache-2.0
"""Images per second and peak memory of whole models on a GPU in bfloat16, interleaved in one process.

Each model runs on contiguous and on channels-last input, and its better one counts: inference and training steps
(forward and backward), eager, or compiled with `--compile`, which takes about half a minute a model and step. Then the
time per pixel of one large image against a batch of small ones.

    python benchmarks/model_cuda.py --json benchmarks/results/model_cuda.json
    python benchmarks/model_cuda.py --compile --layouts channels_last

A model that fails, or whose turn comes after `--limit`, is left out, and the figures say so; they are written after
inference, after training and after the large images. Without a GPU, `--dry-run` makes every call once on the CPU, with
small images, and times nothing; with `--compile` it traces the models.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _models import LAYOUTS, MODELS, better_layout, forward, make, step
from _run import NO_TIME, finish, in_time, keep, make_parser, parse_cuda, time_on_device

from vssm.tools._bench import one_line
from vssm.tools._memory import free_memory

STEPS = dict(inference=forward, train=step)
SHARES = dict(inference=0.5, train=1.0)  # of --limit, at whose end no model of a part is begun any more

Call = Callable[[], None]
Case = tuple[str, str]  # name of a model, layout


def prepare(args: argparse.Namespace, what: str, case: Case, size: int, batch: int) -> Call:
    """A step of a model on the device."""
    name, layout = case
    model, images = make(name, size, batch, what == 'train', layout, args.device)
    if args.compile:
        backend = 'aot_eager' if args.dry_run else 'inductor'
        model = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    return partial(STEPS[what], model, images, bfloat16=True)


def forget() -> None:
    """Free what earlier models have left: compiled code, and memory."""
    torch._dynamo.reset()
    free_memory()


def allocated(device: str) -> int:
    free_memory()
    return 0 if device == 'cpu' else torch.cuda.memory_allocated()


def peak_bytes(call: Call, device: str) -> int:
    """The most that the allocator holds during a call, all that is there included."""
    if device == 'cpu':
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure_steps(
    args: argparse.Namespace, what: str, cases: list[Case], rows: list[dict[str, Any]], left_out: dict[str, str]
) -> None:
    """Add speed and memory of a step to the rows of all models, which take turns for the speed."""
    forget()
    calls: dict[Case, Call] = {}
    peaks: dict[Case, int] = {}
    for case in cases:
        label = f'{" ".join(case)}, {what}'
        if not in_time(args, SHARES[what]):
            left_out[label] = NO_TIME
            continue
        others = allocated(args.device)
        try:
            call = prepare(args, what, case, args.size, args.batch_size)
            call()  # compiles and tunes
            peaks[case] = peak_bytes(call, args.device) - others
            calls[case] = call
        except Exception as error:
            left_out[label] = one_line(error)
    seconds = time_on_device(args, calls)
    for row in rows:
        if any(name == row['name'] for name, _ in seconds):
            layout = better_layout(row['name'], seconds)
            row[f'{what}_layout'] = layout
            row[f'{what}_images_per_s'] = args.batch_size / seconds[row['name'], layout]
            row[f'{what}_peak_mb'] = peaks[row['name'], layout] / 1e6


def measure_large(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Add the time per pixel of a large image over that of small ones to a model's row."""
    forget()
    shapes = dict(large=(args.large, 1), small=(args.size, min(16, args.batch_size)))
    case = row['name'], row['inference_layout']
    calls = {which: prepare(args, 'inference', case, *shape) for which, shape in shapes.items()}
    seconds = time_on_device(args, calls)
    per_pixel = {which: seconds[which] / (size * size * batch) for which, (size, batch) in shapes.items()}
    row['large_per_pixel'] = per_pixel['large'] / per_pixel['small']


def cells_of(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    cells = [row['name']]
    for what in STEPS:
        key = f'{what}_images_per_s'
        cells.append(f'{row[key]:.0f}' if key in row else '-')
        cells.append(f'{row[key] / first[key]:.2f}' if key in row and key in first else '-')
    return [*cells, *(f'{row[key]:{form}}' if key in row else '-' for key, form in LAST.items())]


LAST = dict(train_peak_mb='.0f', large_per_pixel='.2f')


def main() -> int:
    parser = make_parser(__doc__, MODELS, batch_size=128, rounds=9, limit=3600)
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--large', type=int, default=1024, help='side of the one large image; 0: none')
    parser.add_argument('--compile', action='store_true', help='torch.compile the models')
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='layouts to try')
    args = parse_cuda(parser)
    if args.dry_run:
        args.batch_size, args.large, args.rounds = 1, min(args.large, args.size), 1
    torch._dynamo.config.recompile_limit = 64  # the models share code, which is compiled for each of them
    cases = [(name, layout) for name in args.models for layout in args.layouts]
    shared = {key: value for key, value in vars(args).items() if isinstance(value, (bool, int, str))}
    rows: list[dict[str, Any]] = [dict(shared, name=name) for name in args.models]
    left_out: dict[str, str] = {}
    for what in STEPS:
        measure_steps(args, what, cases, rows, left_out)
        if not args.dry_run:
            keep(args, rows, 'cuda', left_out)
    for row in rows if args.large else ():
        if not in_time(args):
            left_out[f'{row["name"]}, {args.large}^2'] = NO_TIME
        elif 'inference_layout' in row:
            measure_large(args, row)
    failed = [f'{what}: {why}' for what, why in left_out.items() if why != NO_TIME]
    if args.dry_run:
        print(*failed, f'dry run: {len(rows)} models, inference and training, nothing timed', sep='\n')
        return bool(failed)
    ratio = f'x {args.models[0]}'
    header = ['model', 'images/s', ratio, 'training images/s', ratio, 'training MB', f'{args.large}^2 per pixel']
    how = 'compiled' if args.compile else 'eager'
    title = f'batch {args.batch_size}, {args.size}x{args.size}, bfloat16 autocast, {how}'
    finish(args, rows, title, header, [cells_of(row, rows[0]) for row in rows], 'cuda', left_out)
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main())
