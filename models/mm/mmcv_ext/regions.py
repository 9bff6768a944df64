# SPDX-License-Identifier: Apache-2.0
"""Pooling over regions of maps: a region is the index of its image, then x1, y1, x2, y2, all in one row."""

from collections.abc import Iterator, Sequence

import torch
import torchvision.ops
from torch import Tensor

from .common import gradients, wide

__all__ = [
    'deform_roi_pool_backward',
    'deform_roi_pool_forward',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
]

NOWHERE = -2.0  # a place beyond every map, whose samples are zero and have no gradient

# ---- samples between the positions -----------------------------------------------------------------------------------


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average or maximum of bilinear samples in each cell of each region, written to `output`; zero without samples.

    Args:
        input: Map, (batch, C, H, W).
        rois: Regions, (regions, 5).
        output: Tensor to write to, (regions, C, aligned_height, aligned_width).
        argmax_y, argmax_x: Tensors that get the places of the maxima, of the shape of `output`; not used for averages.
        aligned_height, aligned_width: Numbers of cells of a region along its height and width.
        spatial_scale: The map's resolution over that of `rois`.
        sampling_ratio: Number of samples of a cell along each axis, 0 for as many as the map's positions in it.
        pool_mode: Kind of pooling, 0 for the maximum, 1 for the average.
        aligned: Whether a position is the middle of its cell rather than the corner.
    """
    size = (aligned_height, aligned_width)
    maps, boxes = wide(input), wide(rois)
    if pool_mode == 1:
        output.copy_(torchvision.ops.roi_align(maps, boxes, size, spatial_scale, sampling_ratio, aligned))
        return
    best = torch.full(output.shape, -torch.inf, dtype=maps.dtype, device=maps.device)
    best_y, best_x = torch.full_like(best, NOWHERE), torch.full_like(best, NOWHERE)
    for y, x, there, _ in _samples(boxes, size, spatial_scale, sampling_ratio, aligned):
        values = _bilinear(maps, boxes, y, x)
        better = _exceeds(values, best) & there
        best = torch.where(better, values, best)
        best_y, best_x = torch.where(better, y, best_y), torch.where(better, x, best_x)
    best.masked_fill_(best_y == NOWHERE, 0)
    for target, result in ((output, best), (argmax_y, best_y), (argmax_x, best_x)):
        target.copy_(result)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of the map of `roi_align_forward`, which has the same arguments, written to `grad_input`."""
    grad_output, boxes = wide(grad_output), wide(rois)
    if pool_mode == 1:
        geometry = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
        grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad_output, boxes, *geometry))
        return
    places = wide(argmax_y), wide(argmax_x)
    grad = torch.zeros_like(wide(grad_input))
    (grad,) = gradients(lambda maps: _bilinear(maps, boxes, *places), [grad], grad_output)
    grad_input.copy_(grad)


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """As `roi_align_forward` with averages, aligned, but every cell is moved.

    Args:
        input, rois, output: Tensors as in `roi_align_forward`.
        offset: x and y by which each cell is moved, over the side of its region and gamma,
            (regions, 2, pooled_height, pooled_width), or empty for no move.
        pooled_height, pooled_width: Numbers of cells of a region along its height and width.
        spatial_scale, sampling_ratio: Numbers as in `roi_align_forward`.
        gamma: Factor of the moves.
    """
    maps, boxes = wide(input), wide(rois)
    move_y, move_x = _moves(boxes, offset, spatial_scale, gamma)
    total = torch.zeros(output.shape, dtype=maps.dtype, device=maps.device)
    for y, x, _, share in _samples(boxes, (pooled_height, pooled_width), spatial_scale, sampling_ratio, True):
        total += _bilinear(maps, boxes, y + move_y, x + move_x) * share
    output.copy_(total)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Gradients of map and moves of `deform_roi_pool_forward`, written to `grad_input` and `grad_offset`."""
    maps, boxes = wide(input), wide(rois)
    inputs = (maps, wide(offset))
    totals = [torch.zeros_like(each) for each in inputs]
    for y, x, _, share in _samples(boxes, (pooled_height, pooled_width), spatial_scale, sampling_ratio, True):

        def sample(maps: Tensor, offset: Tensor, y: Tensor = y, x: Tensor = x) -> Tensor:
            move_y, move_x = _moves(boxes, offset, spatial_scale, gamma)
            return _bilinear(maps, boxes, y + move_y, x + move_x)

        for total, grad in zip(totals, gradients(sample, inputs, wide(grad_output) * share), strict=True):
            total += grad
    grad_input.copy_(totals[0])
    grad_offset.copy_(totals[1])


def _samples(
    boxes: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The samples of all cells, one at a time, as many as the cell with the most has.

    Each is y, (regions, 1, rows, 1), x, (regions, 1, 1, columns), whether the region has it, and its share in the
    region's average, both (regions, 1, 1, 1).
    """
    starts, cells, counts = [], [], []
    for axis, n in ((2, size[0]), (1, size[1])):
        start, end = (boxes[:, i] * scale - 0.5 * aligned for i in (axis, axis + 2))
        side = end - start if aligned else (end - start).clamp(min=1)
        starts.append(start)
        cells.append(side / n)
        counts.append(torch.full_like(side, ratio) if ratio > 0 else (side / n).ceil().clamp(min=0))
    total = (counts[0] * counts[1]).clamp(min=1).view(-1, 1, 1, 1)
    for k in range(int(counts[0].max()) if len(boxes) else 0):
        for m in range(int(counts[1].max())):
            y, x = (
                start[:, None]
                + cell[:, None] * (torch.arange(n, device=boxes.device) + (i + 0.5) / count.clamp(min=1)[:, None])
                for start, cell, count, i, n in zip(starts, cells, counts, (k, m), size, strict=True)
            )
            there = ((k < counts[0]) & (m < counts[1])).view(-1, 1, 1, 1)
            yield y[:, None, :, None], x[:, None, None, :], there, there / total


def _moves(boxes: Tensor, offset: Tensor, scale: float, gamma: float) -> tuple[Tensor | float, Tensor | float]:
    """How far the cells of each region are moved along y and x, both (regions, 1, rows, columns)."""
    if offset.numel() == 0:
        return 0.0, 0.0
    sides = gamma * scale * (boxes[:, 3:] - boxes[:, 1:3])  # width and height
    move_x, move_y = (wide(offset) * sides[:, :, None, None]).split(1, dim=1)
    return move_y, move_x


def _bilinear(maps: Tensor, boxes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples of each region's map, (regions, C, rows, columns), at places that broadcast to this shape.

    Up to a position beyond its edge a map goes on as at the edge; farther away it is zero.
    """
    total: Tensor | float = 0.0
    for row, row_weight in _neighbours(y, maps.shape[2]):
        for column, column_weight in _neighbours(x, maps.shape[3]):
            total = total + maps[*_image_and_channel(maps, boxes), row, column] * (row_weight * column_weight)
    assert isinstance(total, Tensor)
    return total


def _neighbours(places: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The positions before and after each place along an axis, and their weights."""
    inside = (places >= -1) & (places <= size)
    places = places.where(inside, 0).clamp(0, size - 1)
    before = places.floor()
    part = places - before
    index = before.long()
    return (index, (1 - part).where(inside, 0)), ((index + 1).clamp(max=size - 1), part.where(inside, 0))


# ---- positions themselves --------------------------------------------------------------------------------------------


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum over the positions in each cell of each region, written to `output`; zero where there are none.

    The positions are looked at one by one, so that besides maximum and place one value of each cell is held.

    Args:
        input: Map, (batch, C, H, W).
        rois: Regions, whose x2 and y2 belong to them, (regions, 5).
        output: Tensor to write to, (regions, C, pooled_height, pooled_width).
        argmax: Tensor that gets y * W + x of the maxima, -1 where there are none, of the shape of `output`.
        pooled_height, pooled_width: Numbers of cells of a region along its height and width.
        spatial_scale: The map's resolution over that of `rois`.
    """
    (top, bottom), (left, right) = _cells(wide(rois), (pooled_height, pooled_width), spatial_scale, input.shape[2:])
    best = torch.full_like(output, -torch.inf)
    place = torch.full_like(argmax, -1)
    for y in _each(top, bottom):
        for x in _each(left, right):
            values = input[
                *_image_and_channel(input, rois), y.clamp(max=input.shape[2] - 1), x.clamp(max=input.shape[3] - 1)
            ]
            better = _exceeds(values, best) & (y < bottom) & (x < right)
            best = torch.where(better, values, best)
            place = torch.where(better, (y * input.shape[3] + x).to(place.dtype), place)
    output.copy_(best.masked_fill_(place < 0, 0))
    argmax.copy_(place)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of the map of `roi_pool_forward`, written to `grad_input`."""
    grad = torch.zeros_like(wide(grad_input))
    index = *_image_and_channel(grad, rois), argmax.long().clamp(min=0)
    grad.flatten(2).index_put_(index, wide(grad_output).masked_fill(argmax < 0, 0), accumulate=True)
    grad_input.copy_(grad)


def _cells(
    boxes: Tensor, size: tuple[int, int], scale: float, map_size: Sequence[int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cells from their first position to behind the last: along the height, (regions, 1, rows, 1), and the width."""
    starts, ends = boxes[:, 1:3] * scale, (boxes[:, 3:] + 1) * scale
    sides = ends - starts
    regular = (sides > 0).all(1)  # others have no cells
    bounds = []
    for axis, n, most in ((1, size[0], map_size[0]), (0, size[1], map_size[1])):
        start, cell = starts[:, axis, None], sides[:, axis, None] / n
        number = torch.arange(n, device=boxes.device)
        first = (number * cell + start).floor().clamp(0, most).long()
        behind = ((number + 1) * cell + start).ceil().clamp(0, most).long().where(regular[:, None], 0)
        bounds.append((first, behind))
    (top, bottom), (left, right) = bounds
    return (top[:, None, :, None], bottom[:, None, :, None]), (left[:, None, None, :], right[:, None, None, :])


def _each(first: Tensor, behind: Tensor) -> Iterator[Tensor]:
    """The positions of all cells, one of each at a time, as many as the longest has."""
    longest = int((behind - first).max()) if first.numel() else 0
    for step in range(longest):
        yield first + step


# ---- both ------------------------------------------------------------------------------------------------------------


def _image_and_channel(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the regions' images, (regions, 1, 1, 1), and of the channels, (1, C, 1, 1)."""
    channels = torch.arange(maps.shape[1], device=maps.device)
    return boxes[:, 0].long()[:, None, None, None], channels[None, :, None, None]


def _exceeds(values: Tensor, best: Tensor) -> Tensor:
    """Where the values are greater; one that is not a number counts as the greatest, so that it is seen."""
    return (values > best) | values.isnan()
