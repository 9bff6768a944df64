# SPDX-License-Identifier: Apache-2.0
"""Draw effective receptive fields: what of an image the centre of the last feature map sees.

A field is the gradient of the central features with respect to the image, absolute values summed over the channels and
averaged over the images. The table tells whether it has a cross along the rows and columns on which 1-D scans walk:
'cross' is the brightness of the centre's row and column over that of the brighter diagonal, 1 where there is no cross;
'at the rim' is the same of the outermost part; 'diagonals' is the brighter over the fainter one there.
docs/receptive-fields.md has the definitions. Below each field stands what its row and column hold at every distance
from the centre, beside its brighter diagonal.

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

    fields, cells, titles, rows = [], [], [], []
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
            cells.append(cell)
            titles.append(f'{name}\n{weights}\ncross {numbers[0]}, at the rim {numbers[1]}')
    save_figure(draw(fields, cells, titles, len(images)), args.output)
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


class Bands(NamedTuple):
    """Where a field is looked at: in bands through its centre, between two circles.

    Args:
        row: Row of the centre, in pixels.
        column: Column of the centre, in pixels.
        radius: Distance of each pixel from the centre, (H, W).
        members: Masks of the row with the column, and of each diagonal, (H, W) each.
        inner: Radius of the circle beyond which the bands do not overlap.
        outer: Radius of the circle within which the image has all directions.
        rim: Radius at which the outermost part of this ring begins.
    """

    row: float
    column: float
    radius: Tensor
    members: tuple[Tensor, Tensor, Tensor]
    inner: float
    outer: float
    rim: float

    def means(self, field: Tensor, least: float, most: float) -> list[float]:
        """The means of a field in each band between two radii, NaN where there is no pixel."""
        ring = (self.radius > least) & (self.radius <= most)
        return [field[ring & member].mean().item() for member in self.members]


def find_bands(field: Tensor, cell: int) -> Bands:
    """The bands of a field, `cell` wide; the centre is where a square of three cells is brightest, at most half a cell
    from the middle.

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
    sums = F.avg_pool2d(field.double()[None, None], 3 * cell, stride=1)[0, 0]
    rows, columns = (torch.arange(n) + (3 * cell - 1) / 2 for n in sums.shape)
    middle = [(n - 1) / 2 for n in field.shape]
    near = ((rows - middle[0]).abs() <= cell / 2).unsqueeze(1) & ((columns - middle[1]).abs() <= cell / 2)
    best = int(sums.where(near, -1).argmax())
    row, column = rows[best // len(columns)].item(), columns[best % len(columns)].item()

    y = (torch.arange(field.shape[0]) - row).unsqueeze(1).expand(field.shape)
    x = (torch.arange(field.shape[1]) - column).unsqueeze(0).expand(field.shape)
    axes, *diagonals = x.abs().minimum(y.abs()), (x - y).abs() / math.sqrt(2), (x + y).abs() / math.sqrt(2)
    inner = cell / 2 / math.sin(math.pi / 8)
    outer = min(row, column, field.shape[0] - 1 - row, field.shape[1] - 1 - column)
    members = (axes <= cell / 2, diagonals[0] <= cell / 2, diagonals[1] <= cell / 2)
    return Bands(row, column, torch.hypot(x, y), members, inner, outer, max(inner, outer - cell))


def measure_cross(field: Tensor, cell: int) -> Cross:
    """How much a field stands out along its centre's row and column.

    Bands through the centre are compared with the same bands turned by 45 degrees. Only what lies between the two
    circles of `find_bands` counts. The rim is the outermost `cell` of that.

    Args:
        field: Field without negative values, (H, W).
        cell: Side in pixels of a position of the last feature map.

    Raises:
        ValueError: The field is less than CELLS cells wide or high.
    """
    field, bands = field.double(), find_bands(field, cell)
    axes, *diagonals = bands.means(field, bands.inner, bands.outer)
    rim_axes, *rim_diagonals = bands.means(field, bands.rim, bands.outer)
    return Cross(
        _quotient(axes, max(diagonals)),
        _quotient(rim_axes, max(rim_diagonals)),
        _quotient(max(rim_diagonals), min(rim_diagonals)),
    )


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.inf if a else math.nan


def draw(fields: Sequence[Tensor], cells: Sequence[int], titles: Sequence[str], images: int) -> 'Figure':
    """Draw fields side by side, each over its maximum, on one logarithmic scale.

    Below each stands what its row and column hold at every distance from the centre, beside its brighter diagonal.

    Args:
        fields: Fields of one size, (H, W) each.
        cells: Side in pixels of a position of the last feature map, for each field.
        titles: Titles of the fields.
        images: Number of images that the fields are means of.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Circle

    plt = pyplot()
    columns = min(len(fields), 3)  # pictures of more columns are too small to read
    rows = math.ceil(len(fields) / columns)
    fig, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(3.2 * columns + 1.1, 6 * rows + 0.4),
        height_ratios=[3, 2] * rows,
        layout='constrained',
        squeeze=False,
    )
    for ax in [*axes[::2].flat[len(fields) :], *axes[1::2].flat[len(fields) :]]:
        ax.axis('off')
    height, width = fields[0].shape
    pixels = max(1, height // 64)  # side of the squares whose means are shown
    brightness = [F.avg_pool2d(field[None], pixels)[0] for field in fields]
    norm = LogNorm(max(DARKEST, min((field.min() / field.max()).item() for field in brightness)), 1, clip=True)
    for i, (field, cell, title) in enumerate(zip(fields, cells, titles, strict=True)):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        bands, most = find_bands(field, cell), brightness[i].max()
        drawn = above.imshow(
            brightness[i] / most, cmap='cividis', norm=norm, interpolation='nearest', extent=(0, width, height, 0)
        )
        for radius in (bands.rim, bands.outer):
            above.add_patch(Circle((bands.column, bands.row), radius, fill=False, color='white', linestyle=':'))
        above.set_title(title, fontsize=10)
        above.set(xlabel='column (pixels)', ylabel='row (pixels)' if i % columns == 0 else None)

        steps = torch.arange(0, bands.outer, pixels).tolist()
        means = [bands.means(field / most, step, step + pixels) for step in steps]
        below.plot(steps, [along for along, *_ in means], 'C1', label='row and column')
        below.plot(steps, [max(across) for _, *across in means], 'C0--', label='brighter diagonal')
        below.axvspan(bands.rim, bands.outer, color='0.85', label='rim')
        below.set(yscale='log', ylim=(norm.vmin, 1.5), xlabel='distance from the centre (pixels)')
        below.set_ylabel('gradient over its maximum' if i % columns == 0 else None)
    axes[1, 0].legend(fontsize=8)
    fig.colorbar(drawn, ax=axes[::2], label='gradient over its maximum', shrink=0.8)
    fig.suptitle(f'Effective receptive fields of the centre, mean of {images} images. Dotted: the rim.')
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['erf', *sys.argv[1:]]))
