# SPDX-License-Identifier: Apache-2.0
"""Images per second and peak memory of whole models on a GPU in bfloat16, interleaved in one process.

Each model runs on contiguous and on channels-last input, and its better one counts: inference and training steps
(forward and backward), eager, or compiled with `--compile`. Then the time per pixel of one large image against a batch
of small ones.

    python benchmarks/model_cuda.py --json benchmarks/results/model_cuda.json

Without a GPU, `--dry-run` makes every call once on the CPU, with small images, and times nothing.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timing import conditions, interleaved, write_json
from torch import nn

import vssm  # noqa: F401  registers the models

MODELS = ('swin_tiny_patch4_window7_224', 'convnext_tiny', 'vmamba_tiny', 'vmamba2d_tiny', 'spatial_mamba_tiny')
FORMATS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)


def forward(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        model(x)


def step(model: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward; no optimizer."""
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """The most that the allocator holds during a call, parameters and inputs included."""
    if device == 'cpu':
        call()
        return 0
    call()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, help='timm names; ratios are to the first')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--large', type=int, default=1024, help='side of the one large image')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error('needs a CUDA GPU, and PyTorch finds none; --dry-run goes without')
    device = 'cpu' if args.dry_run else 'cuda'
    if args.dry_run:
        args.batch_size, args.large, args.rounds = 1, args.size, 1
    time: Callable[..., dict[Any, float]] = partial(
        interleaved,
        rounds=args.rounds,
        warmup=0 if args.dry_run else 3,
        synchronize=(lambda: None) if args.dry_run else torch.cuda.synchronize,
    )
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # the models share code, which is compiled for each of them

    def make(name: str, layout: str, size: int, batch: int, train: bool) -> tuple[nn.Module, torch.Tensor]:
        model_args = dict(img_size=size) if 'swin' in name else {}
        model = timm.create_model(name, **model_args).train(train).to(device, memory_format=FORMATS[layout])
        model = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
        return model, torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=FORMATS[layout])

    def forget() -> None:
        """What an earlier model has left: compiled code, and memory."""
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()

    rows: list[dict[str, Any]] = [dict(vars(args), json=None, models=None, name=name) for name in args.models]
    for what, call in (('inference', forward), ('train', step)):
        train = call is step
        calls = {
            (name, layout): partial(call, *make(name, layout, args.size, args.batch_size, train))
            for name in args.models
            for layout in FORMATS
        }
        seconds = time(calls)
        del calls
        for row in rows:
            layout = min(FORMATS, key=lambda layout: seconds[row['name'], layout])
            row[f'{what}_layout'] = layout
            row[f'{what}_images_per_s'] = args.batch_size / seconds[row['name'], layout]
            forget()  # so that the model is alone on the device
            peak = peak_bytes(partial(call, *make(row['name'], layout, args.size, args.batch_size, train)), device)
            row[f'{what}_peak_mb'] = peak / 1e6
    for row in rows:
        forget()
        shapes = dict(large=(args.large, 1), small=(args.size, min(16, args.batch_size)))
        calls = {
            name: partial(forward, *make(row['name'], row['inference_layout'], *shape, False))
            for name, shape in shapes.items()
        }
        seconds = time(calls)
        per_pixel = {name: seconds[name] / (size * size * batch) for name, (size, batch) in shapes.items()}
        row['large_per_pixel'] = per_pixel['large'] / per_pixel['small']

    if args.dry_run:
        return print(f'dry run: {len(rows)} models, inference and training, nothing timed')
    how = 'compiled' if args.compile else 'eager'
    title = f'batch {args.batch_size}, {args.size}x{args.size}, bfloat16 autocast, {how}'
    table = Table(title=title, caption=str(conditions('cuda')))
    headings = (
        'model',
        'images/s',
        f'x {args.models[0]}',
        'training images/s',
        f'x {args.models[0]}',
        'training MB',
        f'{args.large}^2 per pixel',
    )
    for heading in headings:
        table.add_column(heading, justify='right')
    for row in rows:
        table.add_row(
            row['name'],
            f'{row["inference_images_per_s"]:.0f}',
            f'{row["inference_images_per_s"] / rows[0]["inference_images_per_s"]:.2f}',
            f'{row["train_images_per_s"]:.0f}',
            f'{row["train_images_per_s"] / rows[0]["train_images_per_s"]:.2f}',
            f'{row["train_peak_mb"]:.0f}',
            f'{row["large_per_pixel"]:.2f}',
        )
    Console().print(table)
    if args.json:
        write_json(
            args.json,
            f'python benchmarks/model_cuda.py{" --compile" if args.compile else ""}',
            rows,
            conditions('cuda'),
        )


if __name__ == '__main__':
    main()
