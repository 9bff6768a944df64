# SPDX-License-Identifier: Apache-2.0
"""Images per second of whole models on the CPU, interleaved in one process.

Each model runs on contiguous and on channels-last input, and its better one counts. "products" is the part of its time
that matrix products and convolutions take, by the profiler: the floor under all else.

    python benchmarks/model_cpu.py --batch-size 8 --json benchmarks/results/model_cpu.json
"""

from collections.abc import Callable
from functools import partial

from _models import CPU_MODELS, LAYOUTS, better_layout, forward, make, step
from _run import finish, make_parser, parse
from torch.profiler import ProfilerActivity, profile

from vssm.tools._bench import median_seconds

PRODUCTS = {'aten::addmm', 'aten::mm', 'aten::bmm', 'aten::mkldnn_convolution', 'aten::convolution_backward'}


def share_of_products(call: Callable[[], None], rounds: int = 3) -> float:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(rounds):
            call()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / total


def main() -> None:
    parser = make_parser(__doc__, CPU_MODELS, batch_size=8, rounds=9, threads=0)
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--train', action='store_true', help='time forward and backward')
    args = parse(parser)

    run = step if args.train else forward
    calls = {
        (name, layout): partial(run, *make(name, args.size, args.batch_size, args.train, layout))
        for name in args.models
        for layout in LAYOUTS
    }
    seconds = median_seconds(calls, args.rounds)
    rows = []
    for name in args.models:
        layout = better_layout(name, seconds)
        rows.append(
            dict(
                name=name,
                layout=layout,
                images_per_s=args.batch_size / seconds[name, layout],
                ms={layout: 1e3 * seconds[name, layout] for layout in LAYOUTS},
                products=share_of_products(calls[name, layout]),
            )
        )
    what = 'training step' if args.train else 'inference'
    cells = [
        [
            row['name'],
            row['layout'],
            f'{row["images_per_s"]:.2f}',
            f'{row["images_per_s"] / rows[0]["images_per_s"]:.2f}',
            f'{row["products"]:.0%}',
        ]
        for row in rows
    ]
    title = f'{what}, batch {args.batch_size}, {args.size}x{args.size}, float32'
    finish(args, rows, title, ['model', 'layout', 'images/s', f'x {args.models[0]}', 'products'], cells)


if __name__ == '__main__':
    main()
