# SPDX-License-Identifier: Apache-2.0
"""Images per second of whole models on the CPU, interleaved in one process.

Each model runs on contiguous and on channels-last input, and its better one counts. "products" is the part of its time
that matrix products and convolutions take, by the profiler: the floor under all else.

    python benchmarks/model_cpu.py --batch-size 8 --json benchmarks/results/model_cpu.json
"""

from collections.abc import Callable
from functools import partial

import timm
import torch
from rich.console import Console
from rich.table import Table
from timing import conditions, cpu_parser, interleaved, parse, write_json
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vssm  # noqa: F401  registers the models

MODELS = ('swin_tiny_patch4_window7_224', 'convnext_tiny', 'vmamba_tiny', 'vmamba2d_tiny', 'spatial_mamba_tiny')
FORMATS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)


def forward(model: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        model(x)


def step(model: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward; no optimizer."""
    model.zero_grad()
    model(x).square().mean().backward()


PRODUCTS = {'aten::addmm', 'aten::mm', 'aten::bmm', 'aten::mkldnn_convolution', 'aten::convolution_backward'}


def share_of_products(call: Callable[[], None], rounds: int = 3) -> float:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(rounds):
            call()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / total


def main() -> None:
    parser = cpu_parser(__doc__, rounds=9)
    parser.add_argument('models', nargs='*', default=MODELS, help='timm names; ratios are to the first')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--train', action='store_true', help='time forward and backward')
    args = parse(parser)

    calls = {}
    for name in args.models:
        for layout, memory_format in FORMATS.items():
            model = timm.create_model(name).train(args.train).to(memory_format=memory_format)
            x = torch.randn(args.batch_size, 3, args.size, args.size).contiguous(memory_format=memory_format)
            calls[name, layout] = partial(step if args.train else forward, model, x)
    seconds = interleaved(calls, args.rounds)

    rows = []
    for name in args.models:
        layout = min(FORMATS, key=lambda layout: seconds[name, layout])
        rows.append(
            dict(
                name=name,
                layout=layout,
                images_per_s=args.batch_size / seconds[name, layout],
                ms={layout: 1e3 * seconds[name, layout] for layout in FORMATS},
                products=share_of_products(calls[name, layout]),
            )
        )
    what = 'training step' if args.train else 'inference'
    table = Table(title=f'{what}, batch {args.batch_size}, {args.size}x{args.size}, float32', caption=str(conditions()))
    for heading in ('model', 'layout', 'images/s', f'x {args.models[0]}', 'products'):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row['name'],
            row['layout'],
            f'{row["images_per_s"]:.2f}',
            f'{row["images_per_s"] / rows[0]["images_per_s"]:.2f}',
            f'{row["products"]:.0%}',
        )
    Console().print(table)
    if args.json:
        write_json(args.json, f'python benchmarks/model_cpu.py{" --train" if args.train else ""}', rows)


if __name__ == '__main__':
    main()
