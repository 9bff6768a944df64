# SPDX-License-Identifier: Apache-2.0
"""Draw effective receptive fields: what of an image the centre of the last feature map sees.

A field is the gradient of the central features with respect to the image, absolute values summed over the channels and
averaged over the images. The table tells whether it has a cross along the rows and columns on which 1-D scans walk:
'cross' is the brightness of the centre's row and column over that of the brighter diagonal, 1 where there is no cross;
'at the rim' is the same of the outermost part; 'diagonals' is the brighter over the fainter one there.
docs/receptive-fields.md has the definitions.

Weights are random unless --pretrained or --checkpoint says otherwise, and the same for models of the same shapes.
"""

import argparse
import io
import json
import math
import pickle
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich.table import Table
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF

from ..models.weights import convert, list_models
from ._common import UsageError, console, find_timm_model, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = 'vssm erf vmamba_tiny vmamba2d_tiny --size 512'

DARKEST = 1e-6  # of the colours, over the brightest
CELLS = 6  # how many positions of the last feature map it takes to measure a cross


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', metavar='NAME', nargs='+', help="models of ours or of timm's, drawn side by side")
    parser.add_argument(
        '--images', metavar='DIR', type=Path, help="folder of images (default: crops of scikit-learn's two photographs)"
    )
    parser.add_argument(
        '--count', metavar='N', type=int, default=50, help='images of DIR, evenly spread over its names (default: 50)'
    )
    add_picture_arguments(parser, 'erf.png')


def add_picture_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """The options of every command that draws what models see."""
    parser.add_argument('--size', metavar='N', type=int, default=224, help='height and width (default: 224)')
    parser.add_argument('--pretrained', action='store_true', help='published weights, downloaded')
    parser.add_argument(
        '--checkpoint',
        metavar='FILE',
        action='append',
        default=[],
        help='weights from a file; for several models once for each in turn, - for one without',
    )
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='of random weights (default: 0)')
    parser.add_argument('--output', metavar='FILE', type=Path, default=Path(output), help=f'default: {output}')


def run(args: argparse.Namespace) -> int:
    check_picture_arguments(args)
    images = read_images(args.images, args.count, args.size) if args.images else sample_images(args.size)
    pyplot()  # a missing package is better told now than after the work

    table = Table('model', 'weights')
    for header in ('cross', 'at the rim', 'diagonals'):
        table.add_column(header, justify='right')
    fields, titles = [], []
    with console.status('') as status:
        for model, name, weights in build_models(args):
            status.update(f'{name}: {len(images)} images')
            cell = model.feature_info[-1]['reduction']
            if args.size < CELLS * cell:
                raise UsageError(f'--size must be at least {CELLS * cell} for {name}, got {args.size}.')
            try:
                field = receptive_field(model, images)
            except (AssertionError, RuntimeError) as error:  # of networks for images of one size
                raise UsageError(f'--size must fit {name}, got {args.size}: {error}') from error
            # Of black bands there is none.
            numbers = [f'{number:.2f}' if math.isfinite(number) else '-' for number in measure_cross(field, cell)]
            table.add_row(name, weights, *numbers)
            fields.append(field)
            titles.append(f'{name}\n{weights}\ncross {numbers[0]}, at the rim {numbers[1]}')
    save_figure(draw(fields, titles, len(images)), args.output)
    console.print(table)
    console.print(
        f'{len(images)} images, {args.size}x{args.size}. Picture: {args.output}', highlight=False, soft_wrap=True
    )
    return 0


def check_picture_arguments(args: argparse.Namespace) -> None:
    """Raise a UsageError for what can be told before any work."""
    args.models = [find_timm_model(name) for name in args.models]
    if args.size < 32:
        raise UsageError(f'--size must be at least 32, got {args.size}.')
    if len(args.checkpoint) not in (0, len(args.models)):
        raise UsageError(
            f'--checkpoint must be given once for each of the {len(args.models)} models, - for one without, got '
            f'{len(args.checkpoint)}.'
        )
    for path in args.checkpoint:
        if path != '-' and not Path(path).is_file():
            raise UsageError(f'--checkpoint must be a file, got {path}, which does not exist.')
    if args.output.suffix != '.png' or not args.output.parent.is_dir():
        raise UsageError(f'--output must be a .png file in a folder that exists, got {args.output}.')


# ---- models ----------------------------------------------------------------------------------------------------------


def build_models(args: argparse.Namespace) -> Iterator[tuple[nn.Module, str, str]]:
    """The models in evaluation mode, one at a time, each with its name and a word on its weights."""
    for name, path in zip(args.models, args.checkpoint or ['-'] * len(args.models), strict=True):
        torch.manual_seed(args.seed)
        try:
            if path != '-':
                model, weights = load_model(name, Path(path)), Path(path).name
            elif args.pretrained:
                model, weights = timm.create_model(name, pretrained=True), 'pretrained'
            else:
                model, weights = timm.create_model(name), f'random, seed {args.seed}'
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise UsageError(str(error).partition('\n')[0]) from error
        if getattr(model, 'in_chans', 3) != 3:
            raise UsageError(f'NAME must be a network for images of 3 channels, got {name} with {path} for another.')
        yield model.eval(), name, weights


def load_model(name: str, path: Path) -> nn.Module:
    """A model with the weights of a file; of ours whatever `vssm convert` reads, with the arguments that it tells."""
    if name.partition('.')[0] not in list_models():
        return timm.create_model(name, checkpoint_path=str(path))
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, 'weights.safetensors')
        model_args = json.loads(convert(path, converted, name.partition('.')[0]).metadata['model_args'])
        if 'features_only' in model_args:
            raise ValueError(f'checkpoint {path} must hold a classifier, got the backbone of a detector or segmentor.')
        return timm.create_model(name, checkpoint_path=str(converted), **model_args)


def normalize(model: nn.Module, images: Tensor) -> Tensor:
    """Images with values in [0, 1], (..., 3, H, W), as a model takes them."""
    return TF.normalize(images, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])


# ---- images ----------------------------------------------------------------------------------------------------------


def read_image(path: Path, size: int) -> Tensor:
    """The middle of an image whose shorter side is scaled to `size`, values in [0, 1], (3, size, size).

    Raises:
        UsageError: There is no such image, or it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith(('I', 'F')):  # which a conversion would clip to white
                raise UsageError(f'{path} must have at most 8 bits a channel, got mode {picture.mode}.')
            picture = picture.convert('RGBA')  # what is transparent lies on white
            image = TF.to_tensor(Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture))[:3]
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f'{path} must be an image that Pillow reads: {error}') from error
    return TF.center_crop(_resize(image, size), [size, size])


def read_images(folder: Path, count: int, size: int) -> list[Tensor]:
    """At most `count` images in a folder and those below it, evenly spread over their sorted paths."""
    if not folder.is_dir():
        raise UsageError(f'--images must be a folder, got {folder}, which is none.')
    if count < 1:
        raise UsageError(f'--count must be at least 1, got {count}.')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UsageError(f'--images must hold images ({", ".join(IMG_EXTENSIONS)}), got {folder} without one.')
    count = min(count, len(paths))
    return [read_image(paths[i * len(paths) // count], size) for i in range(count)]


def sample_images(size: int) -> list[Tensor]:
    """Two rows of three crops, as far apart as they come, of each of scikit-learn's two photographs of 427x640.

    For more than 427 pixels one row is all there is, and is enlarged.
    """
    from sklearn.datasets import load_sample_images

    crops = []
    for photograph in load_sample_images().images:
        image = TF.to_tensor(photograph.copy())  # PyTorch warns of arrays that it cannot write to
        height, width = image.shape[1:]
        side = min(size, height)
        for top in dict.fromkeys((0, height - side)):
            for left in (0, (width - side) // 2, width - side):
                crops.append(_resize(image[:, top : top + side, left : left + side], size))
    return crops


def _resize(image: Tensor, size: int) -> Tensor:
    """To `size` at the shorter side; cubic interpolation overshoots."""
    return TF.resize(image, size, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


# ---- the field and its cross -----------------------------------------------------------------------------------------


def receptive_field(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """How much the centre of the last feature map depends on every pixel, on average over images.

    As in the papers, it is the positive parts of the central features that are summed: of the plain sum, a layer norm
    would leave nothing.

    Args:
        model: One of timm's, in evaluation mode.
        images: Values in [0, 1], each (3, H, W).

    Returns:
        The field, float64, (H, W).
    """
    model.requires_grad_(False)
    field = torch.zeros(images[0].shape[1:], dtype=torch.float64)
    for image in images:
        x = normalize(model, image).unsqueeze(0).requires_grad_()
        features = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]  # [1, C, H/32, W/32]
        height, width = features.shape[2:]
        (grad,) = torch.autograd.grad(features[:, :, height // 2, width // 2].relu().sum(), x)
        field += grad[0].double().abs().sum(0)
    return field / len(images)


class Cross(NamedTuple):
    """Quotients of mean brightness, all 1 for a field that looks the same in all directions."""

    mean: float  # the row and the column over the brighter diagonal
    rim: float  # the same, of the outermost part alone
    diagonals: float  # the brighter diagonal over the fainter one, of the outermost part


def measure_cross(field: Tensor, cell: int) -> Cross:
    """How much a field stands out along its centre's row and column.

    Compared are bands through the centre, `cell` wide, and the same bands turned by 45 degrees. Of all of them only
    what is between two circles counts: beyond the inner one the bands do not overlap, and within the outer one the
    image has all directions. The rim is the outermost `cell` of that. The centre is where a square of three cells has
    the most in it, at most half a cell from the middle.

    Args:
        field: Not negative, (H, W).
        cell: Pixels to a position of the last feature map.

    Raises:
        ValueError: The field is less than CELLS wide or high.
    """
    if min(field.shape) < CELLS * cell:
        raise ValueError(
            f'measure_cross: field must be at least {CELLS * cell} wide and high, got {tuple(field.shape)}.'
        )
    field = field.double()
    sums = F.avg_pool2d(field[None, None], 3 * cell, stride=1)[0, 0]
    rows, columns = (torch.arange(n) + (3 * cell - 1) / 2 for n in sums.shape)
    middle = [(n - 1) / 2 for n in field.shape]
    near = ((rows - middle[0]).abs() <= cell / 2).unsqueeze(1) & ((columns - middle[1]).abs() <= cell / 2)
    best = sums.where(near, -1).argmax().item()
    row, column = rows[best // len(columns)].item(), columns[best % len(columns)].item()

    y = (torch.arange(field.shape[0]) - row).unsqueeze(1).expand(field.shape)
    x = (torch.arange(field.shape[1]) - column).unsqueeze(0).expand(field.shape)
    radius = torch.hypot(x, y)
    inner = cell / 2 / math.sin(math.pi / 8)
    outer = min(row, column, field.shape[0] - 1 - row, field.shape[1] - 1 - column)

    def means(least: float) -> tuple[float, float, float]:
        """Of the row and the column together, and of either diagonal, from a radius outwards."""
        ring = (radius > least) & (radius <= outer)
        distances = x.abs().minimum(y.abs()), (x - y).abs() / math.sqrt(2), (x + y).abs() / math.sqrt(2)
        return tuple(field[ring & (distance <= cell / 2)].mean().item() for distance in distances)

    axes, *diagonals = means(inner)
    rim_axes, *rim_diagonals = means(max(inner, outer - cell))
    return Cross(
        _quotient(axes, max(diagonals)),
        _quotient(rim_axes, max(rim_diagonals)),
        _quotient(max(rim_diagonals), min(rim_diagonals)),
    )


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.inf if a else math.nan


# ---- pictures --------------------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib's pyplot, set to write files."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt


def draw(fields: Sequence[Tensor], titles: Sequence[str], images: int) -> 'Figure':
    """Fields side by side, each over its maximum, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    plt = pyplot()
    columns = min(len(fields), 3)  # more are too small to read
    rows = math.ceil(len(fields) / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns + 1.1, 3.8 * rows + 0.4), layout='constrained', squeeze=False
    )
    for ax in axes.flat[len(fields) :]:
        ax.axis('off')
    height, width = fields[0].shape
    pixels = max(1, height // 64)  # of which a picture shows the mean
    brightness = [F.avg_pool2d(field[None], pixels)[0] for field in fields]
    brightness = [field / field.max() for field in brightness]
    norm = LogNorm(max(DARKEST, min(field.min().item() for field in brightness)), 1, clip=True)
    for ax, field, title in zip(axes.flat, brightness, titles, strict=False):
        drawn = ax.imshow(
            field.numpy(), cmap='cividis', norm=norm, interpolation='nearest', extent=(0, width, height, 0)
        )
        ax.set_title(title, fontsize=10)
        ax.set(xlabel='column (pixels)', ylabel='row (pixels)')
        ax.label_outer()
    fig.colorbar(drawn, ax=axes, label='gradient over its maximum', shrink=0.8)
    fig.suptitle(f'Effective receptive fields of the centre, mean of {images} images')
    return fig


def save_figure(fig: 'Figure', path: Path) -> None:
    """Write a picture as a whole or not at all."""
    data = io.BytesIO()
    fig.savefig(data, format='png', dpi=100, pil_kwargs=dict(optimize=True))
    write_file(path, data.getvalue())
    pyplot().close(fig)


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['erf', *sys.argv[1:]]))
