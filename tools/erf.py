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
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import UsageError, console
from ._pictures import (
    add_picture_arguments,
    build_models,
    check_picture_arguments,
    normalize,
    pyplot,
    read_images,
    sample_images,
    save_figure,
)
from ._tables import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = 'vssm erf vmamba_tiny vmamba2d_tiny --size 512'

DARKEST = 1e-6  # brightness of the darkest colour over that of the brightest
CELLS = 6  # positions of the last feature map, at least, to measure a cross


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', metavar='NAME', nargs='+', help="models of ours or of timm's, drawn side by side")
    parser.add_argument(
        '--images', metavar='DIR', type=Path, help="folder of images (default: crops of scikit-learn's two photographs)"
    )
    parser.add_argument(
        '--count', metavar='N', type=int, default=50, help='images of DIR, evenly spread over its names (default: 50)'
    )
    add_picture_arguments(parser, 'erf.png')


def run(args: argparse.Namespace) -> int:
    check_picture_arguments(args)
    images = read_images(args.images, args.count, args.size) if args.images else sample_images(args.size)
    pyplot()  # a missing package is better told now than after the work

    fields, titles, rows = [], [], []
    with console.status('') as status:
        for model, name, weights, _ in build_models(args):
            status.update(f'{name}: {len(images)} images')
            cell = model.feature_info[-1]['reduction']
            if args.size < CELLS * cell:
                raise UsageError(f'--size must be at least {CELLS * cell} for {name}, got {args.size}.')
            try:
                field = receptive_field(model, images)
            except (AssertionError, RuntimeError) as error:  # from networks for images of one size
                raise UsageError(f'--size must fit {name}, got {args.size}: {error}') from error
            # Black bands have no quotient.
            numbers = [f'{number:.2f}' if math.isfinite(number) else '-' for number in measure_cross(field, cell)]
            rows.append((name, weights, *numbers))
            fields.append(field)
            titles.append(f'{name}\n{weights}\ncross {numbers[0]}, at the rim {numbers[1]}')
    save_figure(draw(fields, titles, len(images)), args.output)
    print_table(['model', 'weights', 'cross', 'at the rim', 'diagonals'], rows)
    console.print(
        f'{len(images)} images, {args.size}x{args.size}. Picture: {args.output}', highlight=False, soft_wrap=True
    )
    return 0


def receptive_field(model: Any, images: Sequence[Tensor]) -> Tensor:
    """How much the centre of the last feature map depends on every pixel, averaged over images.

    As in the papers, the positive parts of the central features are summed: a layer norm would leave nothing of their
    plain sum.

    Args:
        model: Network of timm's, in evaluation mode.
        images: Images with values in [0, 1], each (3, H, W).

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
    rim: float  # the row and the column over the brighter diagonal, in the outermost part alone
    diagonals: float  # the brighter diagonal over the fainter one, in the outermost part


def measure_cross(field: Tensor, cell: int) -> Cross:
    """How much a field stands out along its centre's row and column.

    Bands through the centre, `cell` wide, are compared with the same bands turned by 45 degrees. Only what lies between
    two circles counts: beyond the inner one the bands do not overlap, and within the outer one the image has all
    directions. The rim is the outermost `cell` of that. The centre is where a square of three cells is brightest, at
    most half a cell from the middle.

    Args:
        field: Field without negative values, (H, W).
        cell: Side in pixels of a position of the last feature map.

    Raises:
        ValueError: The field is less than CELLS cells wide or high.
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
    best = int(sums.where(near, -1).argmax())
    row, column = rows[best // len(columns)].item(), columns[best % len(columns)].item()

    y = (torch.arange(field.shape[0]) - row).unsqueeze(1).expand(field.shape)
    x = (torch.arange(field.shape[1]) - column).unsqueeze(0).expand(field.shape)
    radius = torch.hypot(x, y)
    inner = cell / 2 / math.sin(math.pi / 8)
    outer = min(row, column, field.shape[0] - 1 - row, field.shape[1] - 1 - column)

    def means(least: float) -> list[float]:
        """The means of the row with the column, and of each diagonal, from a radius outwards."""
        ring = (radius > least) & (radius <= outer)
        distances = x.abs().minimum(y.abs()), (x - y).abs() / math.sqrt(2), (x + y).abs() / math.sqrt(2)
        return [field[ring & (distance <= cell / 2)].mean().item() for distance in distances]

    axes, *diagonals = means(inner)
    rim_axes, *rim_diagonals = means(max(inner, outer - cell))
    return Cross(
        _quotient(axes, max(diagonals)),
        _quotient(rim_axes, max(rim_diagonals)),
        _quotient(max(rim_diagonals), min(rim_diagonals)),
    )


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.inf if a else math.nan


def draw(fields: Sequence[Tensor], titles: Sequence[str], images: int) -> 'Figure':
    """Draw fields side by side, each over its maximum, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    plt = pyplot()
    columns = min(len(fields), 3)  # pictures of more columns are too small to read
    rows = math.ceil(len(fields) / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns + 1.1, 3.8 * rows + 0.4), layout='constrained', squeeze=False
    )
    for ax in axes.flat[len(fields) :]:
        ax.axis('off')
    height, width = fields[0].shape
    pixels = max(1, height // 64)  # side of the squares whose means are shown
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


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['erf', *sys.argv[1:]]))
