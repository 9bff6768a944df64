# SPDX-License-Identifier: Apache-2.0
"""Draw what a network for slides attends to, on the slide's thumbnail or on the grid of its patches.

The colour says how many times the mean over the patches a patch's weight in the pooling is. Each patch is drawn at its
own coordinates; one that is left out, as it shares a cell with a patch of another piece of tissue, stays blank. The
thumbnail needs the package openslide-python and the slide's file; without either the patches alone are drawn, and a
line says so.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.files import state_of
from ._common import UsageError, console
from ._pictures import check_output, pyplot, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from ..models.mil import MIL

EXAMPLE = 'vssm wsi-heatmap work_dirs/wsi/classification/best.safetensors features/slide_1.h5 --slide slide_1.svs'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='a .safetensors file of a training')
    parser.add_argument('features', metavar='FEATURES', type=Path, help="the slide's .h5 or .pt file")
    parser.add_argument('--slide', metavar='FILE', type=Path, help='the slide itself, for its thumbnail')
    parser.add_argument(
        '--patch-size',
        metavar='N',
        type=int,
        help="distance of neighbouring patches in pixels (default: the slide's, or else the network's, or else 512)",
    )
    parser.add_argument(
        '--output',
        metavar='FILE',
        type=Path,
        default=Path('heatmap.png'),
        help='picture to write (default: heatmap.png)',
    )


def run(args: argparse.Namespace) -> int:
    from ..models.mil import side_of_cells
    from ..models.mil.slides import read_slide

    check_output(args.output)
    which = '' if args.features.is_file() else f', which {state_of(args.features)}'
    if which or args.features.suffix not in ('.h5', '.pt'):
        raise UsageError(f'FEATURES must be a .h5 or .pt file, got {args.features}{which}.')
    if args.patch_size is not None and args.patch_size < 1:
        raise UsageError(f'--patch-size must be at least 1, got {args.patch_size}.')
    pyplot()  # a missing package is better told now than after the work
    try:
        model = load_model(args.checkpoint)
        bag = read_slide(args.features)
        step = side_of_cells(bag.step, args.patch_size or getattr(model, 'patch_size', None))
        with torch.inference_mode():
            logits, weights = (forward(bag.features, bag.coords, steps=[step]) for forward in (model, model.attention))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    thumbnail, on = read_thumbnail(args.slide)
    if thumbnail is not None and (bag.pixels >= torch.tensor(thumbnail[1])).any():
        raise UsageError(
            f'--slide must hold the patches of {args.features.name}, whose coordinates go up to '
            f'{tuple(bag.pixels.amax(0).tolist())}, got {args.slide} of {thumbnail[1]} pixels.'
        )
    title = f'{args.features.stem}\noutputs {describe_outputs(args.checkpoint, logits[0].tolist())}'
    relative = bag.spread(weights / weights.mean())
    save_figure(draw(relative, bag.pixels, step, thumbnail, title), args.output)
    if bag.left_out:
        on += f'; {bag.left_out} of {len(bag.pixels)} patches, left out of the grid, are blank'
    console.print(f'{args.output}, drawn on {on}', highlight=False, soft_wrap=True)
    return 0


def load_model(path: Path) -> 'MIL':
    """The network that a training wrote, in evaluation mode.

    Raises:
        ValueError: The file is not one of a training on slides.
        FileNotFoundError: There is no such file.
    """
    from ..models.mil import create_mil_model, list_mil_models
    from ..models.weights import read_checkpoint

    tensors, metadata = read_checkpoint(path)
    if metadata.get('model') not in list_mil_models():
        raise ValueError(
            f'checkpoint {path} must be the .safetensors file of a training on slides, got one of '
            f'{metadata.get("model", "no model")}.'
        )
    try:
        model = create_mil_model(metadata['model'], **json.loads(metadata['model_args']))
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f'checkpoint {path} does not fit {metadata["model"]}: {error}') from error
    return model.eval()


def describe_outputs(path: Path, logits: Sequence[float]) -> str:
    """A network's outputs for a slide, after the names of the classes that its checkpoint notes."""
    from ..models.weights import read_checkpoint

    names = json.loads(read_checkpoint(path)[1].get('data', '{}')).get('classes') or [''] * len(logits)
    return ', '.join(f'{name} {value:.2f}'.strip() for name, value in zip(names, logits, strict=True))


def read_thumbnail(slide: Path | None) -> tuple[tuple['Image.Image', tuple[int, int]] | None, str]:
    """A small image of a slide and the slide's width and height, or None; and, in words, what is drawn on."""
    if slide is None:
        return None, 'the grid: no --slide is given'
    if not slide.is_file():
        return None, f'the grid: {slide} {state_of(slide)}'
    try:
        import openslide
    except ImportError:
        return None, 'the grid: openslide is not installed, `pip install openslide-python openslide-bin` does it'
    try:
        with openslide.OpenSlide(slide) as opened:
            return (opened.get_thumbnail((1024, 1024)), opened.dimensions), f'the thumbnail of {slide}'
    except openslide.OpenSlideError as error:
        raise UsageError(f'--slide must be a file that openslide reads, got {slide}: {error}') from error


def draw(
    relative: Tensor,
    pixels: Tensor,
    side: int,
    thumbnail: tuple['Image.Image', tuple[int, int]] | None,
    title: str,
) -> 'Figure':
    """Draw each patch's weight over the mean, (n,), as a square at its coordinates, (n, 2); NaN stays blank."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm

    plt = pyplot()
    drawn = relative.isfinite()
    relative, pixels = relative[drawn], pixels[drawn]
    reach = max(2.0, relative.clamp_min(1e-6).log().abs().quantile(0.99).exp().item())
    fig, ax = plt.subplots(figsize=(7.5, 6.5), layout='constrained')
    if thumbnail is not None:
        image, (width, height) = thumbnail
        ax.imshow(image, extent=(0, width, height, 0))
    else:
        width, height = (pixels.amax(0) + side).tolist()
    squares = PolyCollection(
        list((pixels[:, None] + side * torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]])).numpy()),  # n x [4, 2]
        array=relative.clamp(1 / reach, reach).numpy(),
        cmap='RdBu_r',
        norm=LogNorm(1 / reach, reach),
        alpha=0.6 if thumbnail else 1.0,
        linewidth=0,
        antialiased=False,  # or seams would show between neighbours
    )
    ax.add_collection(squares)
    ax.set_facecolor('0.9')
    ax.set(title=title, xlabel='x (pixels)', ylabel='y (pixels)', xlim=(0, width), ylim=(height, 0), aspect='equal')
    bar = fig.colorbar(squares, ax=ax, label='weight over the mean of the patches', shrink=0.8)
    bar.set_ticks([1 / reach, reach**-0.5, 1, reach**0.5, reach], minor=False)
    bar.ax.yaxis.set_major_formatter('{x:.2g}')
    bar.ax.minorticks_off()
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-heatmap', *sys.argv[1:]]))
