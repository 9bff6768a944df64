# SPDX-License-Identifier: Apache-2.0
"""Draw what a network for slides attends to, on the slide's thumbnail or on the grid of its patches.

The colour says how many times the mean over the patches a patch's weight in the pooling is. Each patch is drawn at its
own coordinates; one that is left out, as it shares a cell with a patch of another piece of tissue, stays blank. The
thumbnail, and the gallery of the patches of the largest weights, need the slide's file, and the package
openslide-python unless it is a plain image; without them the patches alone are drawn, and a line says so. Of a folder
with features, a heat map of every slide is drawn.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._common import UsageError, console
from ._pictures import check_output, pyplot, save_figure
from ._slide_images import find_slide_files, read_squares, read_thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from ..models.mil import MIL

EXAMPLE = 'vssm wsi-heatmap work_dirs/wsi/classification/best.safetensors features/slide_1.h5 --slide slide_1.svs'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='a .safetensors file of a training')
    parser.add_argument(
        'features', metavar='FEATURES', type=Path, help="the slide's file, such as SLIDE.h5, or the folder of many"
    )
    parser.add_argument(
        '--slide',
        metavar='FILE',
        type=Path,
        help='the slide itself, for its thumbnail; or the folder of the slides, for those of a folder',
    )
    parser.add_argument(
        '--top',
        metavar='K',
        type=int,
        default=0,
        help='draw the K patches of the largest weights too, as NAME-top.png beside the heat map NAME.png',
    )
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
        help='picture to write (default: heatmap.png); of a folder the folder to write to (default: heatmaps)',
    )


def run(args: argparse.Namespace) -> int:
    if args.patch_size is not None and args.patch_size < 1:
        raise UsageError(f'--patch-size must be at least 1, got {args.patch_size}.')
    if args.top < 0:
        raise UsageError(f'--top must be at least 1, got {args.top}.')
    whole_folder = args.features.is_dir()
    args.output = args.output or Path('heatmaps' if whole_folder else 'heatmap.png')
    if not whole_folder:
        check_output(args.output)
        if not args.features.is_file():
            raise UsageError(f'FEATURES must be a file, such as SLIDE.h5, or a folder of such, got {args.features}.')
    pyplot()  # a missing package is better told now than after the work
    try:
        drawing = Drawing(load_model(args.checkpoint), notes_on_data(args.checkpoint), args.patch_size, args.top)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    if whole_folder:
        return draw_folder(drawing, args.features, args.slide, args.output)
    _say(draw_slide(drawing, [args.features], args.slide, args.output))
    return 0


class Drawing(NamedTuple):
    """What all pictures of a call share."""

    model: 'MIL'
    notes: dict[str, Any]
    patch_size: int | None
    top: int


def draw_folder(drawing: Drawing, features: Path, slides: Path | None, output: Path) -> int:
    """Draw all slides of a folder into another one; a slide that cannot be drawn is told, and the others go on.

    Raises:
        UsageError: There are no slides, or some cannot be drawn.
    """
    from ..models.mil.slides import SlideFolder, count_patches

    if slides is not None and not slides.is_dir():
        raise UsageError(f'--slide must be the folder of the slides where FEATURES is a folder, got {slides}.')
    folder = SlideFolder(features, drawing.notes.get('encoder'))
    names = folder.names
    if not names:
        raise UsageError(f'FEATURES must hold files of features, such as SLIDE.h5, got {features} with none.')
    own = find_slide_files(slides) if slides is not None else {}
    output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        try:
            paths = folder.find(name)
            if not count_patches(*paths, encoder=folder.encoder):
                _say(f'{name}: without patches, and left out')
                continue
            slide = own.get(name) or (slides and slides / name)
            _say(draw_slide(drawing, paths, slide, output / f'{name}.png'))
        except (FileNotFoundError, UsageError, ValueError) as error:
            failed += 1
            _say(f'{name}: {error}')
    if failed:
        raise UsageError(f'{failed} of the {len(names)} slides in {features} could not be drawn.')
    return 0


def draw_slide(drawing: Drawing, paths: Sequence[Path], slide: Path | None, output: Path) -> str:
    """Write the heat map of a slide, and its gallery; a sentence on what was drawn.

    Raises:
        UsageError: The features are unfit for the network, or the slide is another one.
    """
    from ..models.mil import side_of_cells
    from ..models.mil.slides import read_slide

    model = drawing.model
    try:
        bag = read_slide(*paths, encoder=drawing.notes.get('encoder'))
        if bag.pixels is None:
            raise UsageError(f'FEATURES must have coordinates, got {paths[0]} without.')
        step = side_of_cells(bag.step, drawing.patch_size or getattr(model, 'patch_size', None))
        with torch.inference_mode():
            logits, weights = (forward(bag.features, bag.coords, steps=[step]) for forward in (model, model.attention))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    thumbnail, on = read_thumbnail(slide, bag.mpp)
    if thumbnail is not None and (bag.pixels >= torch.tensor(thumbnail[1])).any():
        raise UsageError(
            f'--slide must hold the patches of {paths[0].name}, whose coordinates go up to '
            f'{tuple(bag.pixels.amax(0).tolist())}, got {slide} of {thumbnail[1]} pixels.'
        )
    title = f'{paths[0].stem}\noutputs {describe_outputs(drawing.notes, logits[0].tolist())}'
    relative = bag.spread(weights / weights.mean())
    save_figure(draw(relative, bag.pixels, step, thumbnail, title), output)
    sentence = f'{output}, drawn on {on}'
    if bag.left_out:
        sentence += f'; {bag.left_out} of {bag.total} patches, left out of the grid, are blank'
    if drawing.top and thumbnail is None:
        sentence += '; without the slide there is no gallery'
    elif drawing.top and slide is not None:
        rows = relative.nan_to_num(-1).topk(min(drawing.top, len(bag.features))).indices
        corners = [(x, y) for x, y in bag.pixels[rows].tolist()]
        gallery = output.with_name(f'{output.stem}-top.png')
        images = read_squares(slide, corners, step, bag.mpp)
        save_figure(draw_gallery(images, relative[rows].tolist(), corners, title), gallery)
        sentence += f'; {gallery}'
    return sentence


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def load_model(path: Path) -> 'MIL':
    """The network that a training wrote, in evaluation mode.

    Raises:
        ValueError: The file is not one of a training on slides.
        FileNotFoundError: There is no such file.
    """
    from ..models.mil import create_mil_model, current_name
    from ..models.weights import read_checkpoint

    tensors, metadata = read_checkpoint(path)
    name = current_name(metadata.get('model'))
    if name is None:
        raise ValueError(
            f'checkpoint {path} must be the .safetensors file of a training on slides, got one of '
            f'{metadata.get("model", "no model")}.'
        )
    try:
        model = create_mil_model(name, **json.loads(metadata['model_args']))
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f'checkpoint {path} does not fit {metadata["model"]}: {error}') from error
    return model.eval()


def describe_outputs(notes: Mapping[str, Any], logits: Sequence[float]) -> str:
    """A network's outputs for a slide, after the names of the classes that its checkpoint notes."""
    names = notes.get('classes') or [''] * len(logits)
    return ', '.join(f'{name} {value:.2f}'.strip() for name, value in zip(names, logits, strict=True))


def notes_on_data(path: Path) -> dict[str, Any]:
    """What a checkpoint notes of the data of its training; nothing where it notes none."""
    from ..models.weights import read_checkpoint

    return json.loads(read_checkpoint(path)[1].get('data', '{}'))


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


def draw_gallery(
    images: Sequence['Image.Image'], relative: Sequence[float], corners: Sequence[tuple[int, int]], title: str
) -> 'Figure':
    """Draw patches in rows of four, each with its weight over the mean and its coordinates."""
    plt = pyplot()
    across = min(4, len(images))
    down = -(-len(images) // across)
    fig, axes = plt.subplots(
        down, across, figsize=(2.4 * across, 2.7 * down + 0.6), layout='constrained', squeeze=False
    )
    for ax in axes.flat:
        ax.axis('off')
    for ax, image, weight, corner in zip(axes.flat, images, relative, corners, strict=False):
        ax.imshow(image)
        ax.set_title(f'{weight:.2f} times the mean\nat {corner[0]}, {corner[1]}', fontsize=9)
    fig.suptitle(title)
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-heatmap', *sys.argv[1:]]))
