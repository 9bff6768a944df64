# SPDX-License-Identifier: Apache-2.0
"""The grid of a slide: which of its cells each patch lies in."""

from torch import Tensor

__all__ = ['to_cells']

MAX_CELLS = 1 << 22  # of a grid: more than any slide has, and what a wrong patch size or coordinate soon exceeds


def to_cells(
    coords: Tensor,
    patch_size: int,
    grid_size: tuple[int, int] | None = None,
    crop: bool = False,
) -> tuple[Tensor, tuple[int, int]]:
    """The cell of each patch on the slide's grid, row * width + column, (n,), and the grid's height and width.

    Args:
        coords: Pixel coordinates of the patches, whole numbers, (n, 2), x before y.
        patch_size: Side of a cell in the same pixels.
        grid_size: Height and width of the grid in cells; unless given, it ends with the last patch.
        crop: Begin the grid with the first patch too: the bounding box of the tissue.

    Raises:
        ValueError: A patch lies outside of the grid, or two lie in one cell; with their rows in `coords`.
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
        row = off.nonzero()[0].item()
        grid = f'a grid of {grid_size[0]} x {grid_size[1]} cells' if grid_size is not None else 'the grid'
        raise ValueError(
            f'coords row {row} must lie on {grid} of {patch_size} pixels each, got {tuple(coords[row].tolist())}.'
        )
    if crop:
        rows, columns = rows - rows.min(), columns - columns.min()
    height, width = grid_size if grid_size is not None else (rows.max().item() + 1, columns.max().item() + 1)
    if height * width > MAX_CELLS:
        raise ValueError(
            f'coords must span at most {MAX_CELLS} cells, got {height} x {width} of {patch_size} pixels each: is '
            'patch_size right?'
        )
    cells = rows * width + columns
    ordered, order = cells.sort(stable=True)
    same = (ordered[1:] == ordered[:-1]).nonzero()
    if len(same):
        first, second = order[same[0].item()].item(), order[same[0].item() + 1].item()
        raise ValueError(
            f'coords must put one patch into a cell of {patch_size} pixels, got rows {first} and {second} in one, '
            f'{tuple(coords[first].tolist())} and {tuple(coords[second].tolist())}: is patch_size right?'
        )
    return cells, (height, width)
