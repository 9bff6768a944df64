# SPDX-License-Identifier: Apache-2.0
"""Images per second of whole models on the CPU, interleaved in one process.

Each model runs on contiguous and on channels-last input, and its better one counts. "products" is the part of its time
that matrix products and convolutions take, by the profiler: the floor under all else.

    python benchmarks/model_cpu.py --batch-size 8 --json benchmarks/results/model_cpu.json
    python benchmarks/model_cpu.py vmamba2d_tiny convnext_tiny --batch-size 1 --compile --freeze

`--table` makes the rows of ROWS, or those that are named, one after the other and each in a process of its own: what a
user runs on a CPU, as ratios to the first model. It ends by itself after `--limit` seconds, by default in 15 minutes:

    python benchmarks/model_cpu.py --table --rounds 3 --json benchmarks/results/model_cpu_table.json

Rows in bfloat16 are left out where the processor has no instructions for it (AVX512-BF16 or AMX): there they would be
about the widening of operands alone. Rows that compile do so with an empty cache, and say how long it took.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _models import CPU_MODELS, LAYOUTS, better_layout, forward, make, step
from _run import NO_TIME, STARTED, finish, in_time, make_parser, parse, run_alone
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

from vssm.tools._bench import Timing, median_and_spread, time_interleaved
from vssm.tools._models import PEERS

DTYPES = ('float32', 'bfloat16', 'autocast')  # of weights and images, or chosen by autocast to bfloat16
TABLE_MODELS = (*PEERS, 'mambaout_tiny', 'vmamba2d_tiny', 'spatial_mamba_tiny')
ROWS = {  # of the table: the options of each. Compilers choose layouts by themselves
    'float32': '--batch-size 8',
    'float32-one': '--batch-size 1',
    'training': '--batch-size 8 --train',
    'bfloat16': '--batch-size 8 --dtype bfloat16',
    'autocast': '--batch-size 8 --dtype autocast',
    'training-autocast': '--batch-size 8 --dtype autocast --train',
    'compiled': '--batch-size 8 --compile --layouts channels_last',
    'compiled-one': '--batch-size 1 --compile --layouts channels_last',
    'compiled-bfloat16': '--batch-size 8 --dtype bfloat16 --compile --layouts channels_last',
    'kept': '--batch-size 8 --compile --keep-layouts --layouts channels_last',
    'kept-one': '--batch-size 1 --compile --keep-layouts --layouts channels_last',
    'frozen': '--batch-size 8 --compile --freeze --layouts channels_last',
    'frozen-one': '--batch-size 1 --compile --freeze --layouts channels_last',
}
PRODUCTS = {
    *(f'aten::{name}' for name in ('addmm', 'mm', 'bmm', 'baddbmm', 'mkldnn_convolution', 'convolution_backward')),
    *(f'mkldnn::{name}' for name in ('_linear_pointwise', '_convolution_pointwise', '_convolution_pointwise_')),
    'mkl::_mkl_linear',
}
NO_BFLOAT16 = 'the processor has neither AVX512-BF16 nor AMX'
LEAST_SHARE = 0.01  # of an operator that is kept

Call = Callable[[], None]


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16; without, operands are widened first."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shares_of_time(call: Call, rounds: int = 3) -> dict[str, float]:
    """The share that each operator has of the time of a step, by the profiler, the largest first.

    Loops that a compiler wrote are in the share of the region that it compiled.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(rounds):
            call()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events}


def prepare(args: argparse.Namespace, name: str, layout: str) -> tuple[Call, float]:
    """A step of a model, and the seconds that the first one took, in which compilers work."""
    model, images = make(name, args.size, args.batch_size, args.train, layout)
    if args.dtype == 'bfloat16':
        model, images = model.bfloat16(), images.bfloat16()
    if args.compile:
        model = torch.compile(model, dynamic=False)
    call = partial(step if args.train else forward, model, images, bfloat16=args.dtype == 'autocast')
    start = time.perf_counter()
    call()
    return call, time.perf_counter() - start


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model."""
    cases = [(name, layout) for name in args.models for layout in args.layouts]
    prepared = {case: prepare(args, *case) for case in cases}
    timings = {case: Timing(call) for case, (call, _) in prepared.items()}
    time_interleaved(timings.values(), args.rounds)
    for case, timing in timings.items():
        if timing.error is not None:
            raise RuntimeError(f'{" ".join(case)} failed: {timing.error}')
    seconds = {case: median_and_spread(timing.seconds)[0] for case, timing in timings.items()}
    best = {name: (name, better_layout(name, seconds)) for name in args.models}
    rows = []
    for name, case in best.items():
        shares = shares_of_time(prepared[case][0])
        first = timings[best[args.models[0]]].seconds
        ratio, spread = median_and_spread([a / b for a, b in zip(first, timings[case].seconds, strict=True)])
        rows.append(
            dict(
                name=name,
                layout=case[1],
                images_per_s=args.batch_size / seconds[case],
                ratio=ratio,
                ratio_spread=spread,
                ms={layout: 1e3 * seconds[name, layout] for layout in args.layouts},
                products=sum(share for key, share in shares.items() if key in PRODUCTS),
                shares={key: share for key, share in shares.items() if share >= LEAST_SHARE},
                **(dict(compile_s=prepared[case][1]) if args.compile else {}),
            )
        )
    return rows


def title_of(args: argparse.Namespace) -> str:
    what = 'training step' if args.train else 'inference'
    how = ', compiled' * args.compile + ', layouts kept' * args.keep_layouts + ', frozen' * args.freeze
    dtype = dict(float32='float32', bfloat16='bfloat16', autocast='bfloat16 autocast')[args.dtype]
    slow = f' ({NO_BFLOAT16})' if args.dtype != 'float32' and not multiplies_bfloat16() else ''
    return f'{what}{how}, batch {args.batch_size}, {args.size}x{args.size}, {dtype}{slow}'


def ratio_of(row: dict[str, Any]) -> str:
    return f'{row["ratio"]:.2f}' + ('' if row['ratio_spread'] is None else f' ±{row["ratio_spread"]:.2f}')


def time_models(args: argparse.Namespace) -> None:
    options = torch._inductor.config.patch(freezing=args.freeze, layout_optimization=not args.keep_layouts)
    with options, fresh_cache() if args.compile else contextlib.nullcontext():
        rows = measure(args)
    header = ['model', 'layout', 'images/s', f'x {args.models[0]}', 'products']
    cells = [
        [row['name'], row['layout'], f'{row["images_per_s"]:.2f}', ratio_of(row), f'{row["products"]:.0%}']
        for row in rows
    ]
    if args.compile:
        header.append('first call, s')
        cells = [[*line, f'{row["compile_s"]:.0f}'] for line, row in zip(cells, rows, strict=True)]
    finish(args, rows, title_of(args), header, cells)


def time_row(args: argparse.Namespace, options: str, file: Path) -> list[dict[str, Any]]:
    """The rows of a run with some options, in a process of its own."""
    shared = ('--size', args.size, '--rounds', args.rounds, '--threads', args.threads, '--json', file)
    left = args.limit - (time.monotonic() - STARTED)
    run_alone(*args.models, *shared, *shlex.split(options), timeout=max(left, 1))
    return json.loads(file.read_text())['rows']


def make_table(args: argparse.Namespace) -> None:
    rows, cells, left_out = [], [], {}
    for name in args.table or ROWS:
        if any(dtype in ROWS[name] for dtype in DTYPES[1:]) and not multiplies_bfloat16():
            left_out[name] = NO_BFLOAT16
            continue
        if not in_time(args):
            left_out[name] = NO_TIME
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = time_row(args, ROWS[name], Path(folder, 'row.json'))
        except subprocess.TimeoutExpired:
            left_out[name] = NO_TIME
            continue
        except subprocess.CalledProcessError as error:
            left_out[name] = f'it failed with exit status {error.returncode}'
            continue
        rows += [dict(row=name, options=ROWS[name], **row) for row in found]
        figures = [f'{ratio_of(row)}, {row["products"]:.0%}' for row in found[1:]]
        cells.append([name, f'{found[0]["images_per_s"]:.2f}, {found[0]["products"]:.0%}', *figures])
    title = f'images/s of {args.models[0]} and ratios to it, beside the share of products, {args.size}x{args.size}'
    finish(args, rows, title, ['row', *args.models], cells, left_out=left_out)


def main() -> None:
    parser = make_parser(__doc__, CPU_MODELS, batch_size=8, rounds=9, threads=0, limit=900)
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--train', action='store_true', help='time forward and backward')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='of weights and images, or by autocast')
    parser.add_argument('--compile', action='store_true', help='torch.compile the models')
    parser.add_argument('--freeze', action='store_true', help='have the compiler fold and pack weights')
    parser.add_argument('--keep-layouts', action='store_true', help='have the compiler keep the layouts of maps')
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='layouts to try')
    parser.add_argument('--table', nargs='*', choices=ROWS, help='make these rows of the table; without names, all')
    args = parse(parser)
    if args.keep_layouts and not args.compile:
        parser.error('--keep-layouts is for --compile')
    if args.freeze and (args.train or not args.compile):
        parser.error('--freeze is for inference by --compile')
    torch._dynamo.config.recompile_limit = 64  # the models share code, which is compiled for each of them
    if args.table is None:
        time_models(args)
    else:
        if args.models == CPU_MODELS:
            args.models = TABLE_MODELS
        make_table(args)


if __name__ == '__main__':
    main()
