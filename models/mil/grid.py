# SPDX-License-Identifier: Apache-2.0
"""The patches of a slide on its grid."""

from pathlib import Path

import torch
from torch import Tensor

__all__ = ['FOLD', 'check_memory', 'find_step', 'fold_gaps', 'place', 'shorten_gaps', 'side_of_cells', 'to_cells']

MAX_CELLS = 1 << 22  # more than any slide has; a grid by a wrong patch size or coordinate soon exceeds it
PATCH_SIZE = 512  # of the published runs
FOLD = 16  # empty rows or columns that one stands for


def find_step(coords: Tensor) -> float | None:
    """The step of a slide's grid, in pixels, by the distances of patches that follow each other in a row or a column.

    It is the largest of their common distances that two thirds of them are multiples of, to a pixel. In tissue without
    many holes that is the commonest one. Where patches are few and far between, twice the step may be commoner than the
    step, but not all distances are multiples of it. Pieces of tissue whose grids begin anywhere make a few distances of
    any length. A step that is no whole number, as of patches cut by physical size, gives distances one pixel apart, and
    is their mean.

    Args:
        coords: Pixel coordinates of the patches, whole numbers from 0, (n, 2).

    Returns:
        The step, or None where it is not seen three times.
    """
    gaps = []
    for place, line in (coords.unbind(1), coords.flip(1).unbind(1)):
        order = (line * (place.max() + 1) + place).argsort()
        gaps.append(place[order].diff()[line[order].diff() == 0])
    distances, counts = torch.cat(gaps).unique(return_counts=True)
    distances, counts = distances[distances > 0], counts[distances > 0]
    for step in _common(distances, counts):
        steps = (distances + step // 2) // step
        off = (distances - steps * step).abs()
        multiple = (steps > 0) & (off <= (step > 16))  # coordinates may count cells, whose step is 1
        total = counts[multiple].sum()
        if 3 * total >= 2 * counts.sum() and counts[multiple & (steps == 1)].sum() >= 3:
            if 20 * counts[multiple & (off > 0)].sum() <= total:
                return float(step)
            return (distances * counts)[multiple].sum().item() / (steps * counts)[multiple].sum().item()
    return None


def _common(distances: Tensor, counts: Tensor) -> Tensor:
    """The distances that occur a quarter as often as the commonest one, 64 at most, the largest first."""
    if not len(counts):
        return distances
    most = counts.topk(min(64, len(counts)))
    return distances[most.indices[4 * most.values >= counts.amax()]].sort(descending=True).values


def place(coords: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Put patches whose pieces of tissue have grids of their own, as CLAM cuts them, on one grid.

    The grid is that on which most patches lie. A piece of tissue keeps its form and moves by half a cell at most. Where
    two pieces overlap, two patches can come into one cell, of which the nearer to the cell's centre is kept. A slide
    with the same coordinates twice, or where this meets more than a quarter of all patches, has no such grid: all its
    patches are kept where they are, so that `to_cells` refuses it.

    Args:
        coords: Pixel coordinates of the patches, whole numbers from 0, (n, 2).
        step: Distance of neighbouring patches, in pixels.

    Returns:
        The coordinates of the patches that are kept, (k, 2), of which `coords // round(step)` are cells, and the rows
        of these patches in order, (k,). A slide whose patches lie on one grid of whole pixels is returned as it is.
    """
    whole, rows = round(step), torch.arange(len(coords), device=coords.device)
    phases = (coords.double() % step).long().clamp(max=whole - 1)
    if step == whole and (phases == phases[0]).all():
        return coords, rows
    pairs, counts = (phases[:, 1] * whole + phases[:, 0]).unique(return_counts=True)
    most = pairs[counts.argmax()]
    origin = torch.stack([most % whole, most // whole])
    cells = ((coords - origin).double() / step + 0.5).floor()  # in double precision: halves are exact
    off_centre = (coords - origin - cells * step).square().sum(1)
    cells = cells.long() - cells.long().amin(0).clamp(max=0)

    order = off_centre.argsort(stable=True)
    order = order[(cells[order, 1] * (cells[:, 0].max() + 1) + cells[order, 0]).argsort(stable=True)]
    shared = (cells[order].diff(dim=0) == 0).all(1)  # whether a patch has the cell of the one before
    twice = shared & (coords[order].diff(dim=0).abs().amax(1) <= 1)
    if twice.any() or 4 * shared.sum() > len(coords):
        return coords, rows
    kept = order[torch.cat([shared.new_zeros(1), shared]).logical_not()].sort().values
    return cells[kept] * whole + origin, kept


def side_of_cells(step: int | None, patch_size: int | None) -> int:
    """The side of a slide's cells in pixels: its step, or the size that is given, or else that of the published runs.

    Args:
        step: Distance of the slide's neighbouring patches, None where its file does not tell.
        patch_size: Size given for all slides, None for none.

    Raises:
        ValueError: The two contradict each other.
    """
    if step is not None and patch_size is not None and step != patch_size:
        raise ValueError(f"patch_size must be the step of the slide's patches, {step} pixels, got {patch_size}.")
    return step or patch_size or PATCH_SIZE


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


def shorten_gaps(cells: Tensor, grid: tuple[int, int], max_gap: int) -> tuple[Tensor, tuple[int, int]]:
    """Leave out the rows and columns by which a stretch without a patch exceeds max_gap; cells and grid as `to_cells`.

    A stretch may also lie before the first patch; the grid ends with the last one.
    """
    axes = []
    for index in (cells // grid[1], cells % grid[1]):
        used, inverse = index.unique(return_inverse=True)
        gaps = used.diff(prepend=used.new_full((1,), -1)) - 1
        axes.append((gaps.clamp(max=max_gap) + 1).cumsum(0)[inverse] - 1)
    rows, columns = axes
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    return rows * width + columns, (height, width)


def fold_gaps(cells: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int], Tensor | None]:
    """Fold long stretches of rows and columns without a patch, and leave out those around the tissue.

    A folded row or column stands for FOLD, over which a state must fade as often. Three that are empty stay beside the
    folded ones, all that a causal convolution of four sees.

    Returns:
        Cells and grid as `to_cells`, and where the grid has folded rows or columns, (H, W), None if nowhere.
    """
    axes, folded = [], []
    for index in (cells // grid[1], cells % grid[1]):
        used, inverse = index.unique(return_inverse=True)
        folds = (used.diff() - 4).clamp(min=0) // FOLD  # of the empty ones, three less
        places = used - used[0]
        places[1:] -= (FOLD - 1) * folds.cumsum(0)
        bounds = places.new_zeros(int(places[-1]) + 1)
        bounds.index_add_(0, places[:-1] + 1, torch.ones_like(folds))
        bounds.index_add_(0, places[:-1] + 1 + folds, -torch.ones_like(folds))
        axes.append(places[inverse])
        folded.append(bounds.cumsum(0) > 0)
    rows, columns = axes
    height, width = map(len, folded)
    where = folded[0][:, None] | folded[1]
    return rows * width + columns, (height, width), where if where.any() else None


def check_memory(grid: tuple[int, int], numbers: int, device: torch.device) -> None:
    """Refuse a grid for whose network the memory at hand is too small, where the system tells how much there is.

    Args:
        grid: Height and width of the grid in cells.
        numbers: Count of the numbers of four bytes that the network needs for each cell.
        device: Device of the network.

    Raises:
        ValueError: There is too little memory.
    """
    needed = 4 * numbers * grid[0] * grid[1]
    if needed < 1 << 30:  # there always is as much, and the question takes time
        return
    there = _free_bytes(device)
    if there is not None and needed > there:
        raise ValueError(
            f'coords make a grid of {grid[0]} x {grid[1]} cells, which needs about {needed / 1e9:.1f} GB of memory, '
            f"got {there / 1e9:.1f} GB: is patch_size right? crop, max_gap and pad_token='none' make grids smaller."
        )


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a process can still have: on a GPU, or in Linux within the limit of its control group."""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return None
    try:
        group = Path('/sys/fs/cgroup')
        limit, used = (int((group / f'memory.{name}').read_text()) for name in ('max', 'current'))
        cache = next(
            int(line.split()[1])
            for line in (group / 'memory.stat').read_text().splitlines()
            if line.startswith('inactive_file ')  # which the system frees when it must
        )
    except (OSError, ValueError, StopIteration):
        return free
    return min(free, limit - used + cache)
