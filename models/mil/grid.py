# SPDX-License-Identifier: Apache-2.0
"""The patches of a slide on its grid."""

import torch
from torch import Tensor

__all__ = ['to_cells']

MAX_CELLS = 1 << 22  # more than any slide has; a grid by a wrong patch size or coordinate soon exceeds it


def to_cells(
    coords: Tensor,
    patch_size: int,
    grid_size: tuple[int, int] | None = None,
    crop: bool = False,
) -> tuple[Tensor, tuple[int, int]]:
    """The cell of each patch on the slide's grid, as row * width + column, (n,), and the grid's height and width.

    Args:
        coords: Pixel coordinates of the patches, whole numbers, (n, 2), x before y.
        patch_size: Side of a cell in the same pixels.
        grid_size: Height and width of the grid in cells; unless given, the grid ends with the last patch.
        crop: Whether the grid begins with the first patch, so that it is the bounding box of the tissue.

    Raises:
        ValueError: coords has another form, a patch lies outside of the grid, two lie in one cell, or the grid has too
            many cells.
    """
    if coords.ndim != 2 or coords.shape[1] != 2 or not len(coords) or coords.is_floating_point():
        raise ValueError(
            f'coords must be whole numbers of shape (n, 2) with n >= 1, got {tuple(coords.shape)} of {coords.dtype}.'
        )
    columns, rows = coords.long().div(patch_size, rounding_mode='floor').unbind(1)
    off = (coords < 0).any(1)
    if grid_size is not None:
        off |= (rows >= grid_size[0]) | (columns >= grid_size[1])
    if off.any():
        row = int(off.nonzero()[0])
        grid = f'a grid of {grid_size[0]} x {grid_size[1]} cells' if grid_size is not None else 'the grid'
        raise ValueError(
            f'coords row {row} must lie on {grid} of {patch_size} pixels each, got {tuple(coords[row].tolist())}.'
        )
    if crop:
        rows, columns = rows - rows.min(), columns - columns.min()
    height, width = grid_size if grid_size is not None else (int(rows.max()) + 1, int(columns.max()) + 1)
    if height * width > MAX_CELLS:
        raise ValueError(
            f'coords must span at most {MAX_CELLS} cells, got {height} x {width} of {patch_size} pixels each: is '
            'patch_size right?'
        )
    cells = rows * width + columns
    ordered, order = cells.sort(stable=True)
    same = (ordered[1:] == ordered[:-1]).nonzero()
    if len(same):
        first, second = map(int, order[same[0] + torch.arange(2, device=order.device)])
        raise ValueError(
            f'coords must put one patch into a cell of {patch_size} pixels, got rows {first} and {second} in one, '
            f'{tuple(coords[first].tolist())} and {tuple(coords[second].tolist())}: is patch_size right?'
        )
    return cells, (height, width)
