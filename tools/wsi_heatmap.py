# SPDX-License-Identifier: Apache-2.0
"""Draw what a network for slides attends to, on the slide's thumbnail or on the grid of its patches.

The colour says how many times the mean over the patches a patch's weight in the pooling is. The thumbnail needs the
package openslide-python and the slide's file; without either the grid is drawn, and a line says so.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
        '--patch-size', metavar='N', type=int, help="side of a patch in pixels (default: the network's, or else 512)"
    )
    parser.add_argument(
        '--output',
        metavar='FILE',
        type=Path,
        default=Path('heatmap.png'),
        help='picture to write (default: heatmap.png)',
    )


def run(args: argparse.Namespace) -> int:
    from ..models.mil import to_cells
    from ..models.mil.slides import read_slide

    check_output(args.output)
    if not args.features.is_file() or args.features.suffix not in ('.h5', '.pt'):
        raise UsageError(f'FEATURES must be a .h5 or .pt file, got {args.features}.')
    if args.patch_size is not None and args.patch_size < 1:
        raise UsageError(f'--patch-size must be at least 1, got {args.patch_size}.')
    pyplot()  # a missing package is better told now than after the work
    try:
        model = load_model(args.checkpoint)
        features, coords = read_slide(args.features)
        patch_size = args.patch_size or getattr(model, 'patch_size', 512)
        cells, grid = to_cells(coords, patch_size)
        with torch.inference_mode():
            logits, weights = model(features, coords)[0], model.attention(features, coords)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    thumbnail, on = read_thumbnail(args.slide)
    title = f'{args.features.stem}\noutputs {describe_outputs(args.checkpoint, logits.tolist())}'
    save_figure(draw(weights / weights.mean(), cells, grid, coords, patch_size, thumbnail, title), args.output)
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
        return None, f'the grid: {slide} does not exist'
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
    cells: Tensor,
    grid: tuple[int, int],
    coords: Tensor,
    patch_size: int,
    thumbnail: tuple['Image.Image', tuple[int, int]] | None,
    title: str,
) -> 'Figure':
    """Draw each patch's weight over the mean, (n,), in its cell, (n,), of a grid; cells without a patch stay empty."""
    from matplotlib.colors import LogNorm

    plt = pyplot()
    height, width = grid
    picture = torch.full((height * width,), torch.nan).index_copy(0, cells, relative).unflatten(0, grid)
    reach = max(2.0, relative.clamp_min(1e-6).log().abs().quantile(0.99).exp().item())
    # Cells begin at multiples of the patch's size, patches wherever the tissue was first met.
    left, top = (coords % patch_size).median(0).values.tolist()
    extent = (left, left + width * patch_size, top + height * patch_size, top)
    fig, ax = plt.subplots(figsize=(7.5, 6.5), layout='constrained')
    if thumbnail is not None:
        image, (image_width, image_height) = thumbnail
        ax.imshow(image, extent=(0, image_width, image_height, 0))
    norm = LogNorm(1 / reach, reach)
    drawn = ax.imshow(
        picture.clamp(1 / reach, reach), cmap='RdBu_r', norm=norm, extent=extent, alpha=0.6 if thumbnail else 1.0
    )
    ax.set_facecolor('0.9')
    ax.set(title=title, xlabel='x (pixels)', ylabel='y (pixels)')
    ax.set_xlim(0, thumbnail[1][0] if thumbnail else extent[1])
    ax.set_ylim(thumbnail[1][1] if thumbnail else extent[2], 0)
    bar = fig.colorbar(drawn, ax=ax, label='weight over the mean of the patches', shrink=0.8)
    bar.set_ticks([1 / reach, reach**-0.5, 1, reach**0.5, reach], minor=False)
    bar.ax.yaxis.set_major_formatter('{x:.2g}')
    bar.ax.minorticks_off()
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-heatmap', *sys.argv[1:]]))
