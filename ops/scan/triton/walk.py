# SPDX-License-Identifier: Apache-2.0
"""Where the places of a walk lie in memory."""

import triton
import triton.language as tl

# Sizes and strides are no reason to compile again. Nor may the compiler use that they are multiples of 16: it would
# give a thread several channels side by side, and the places of one warp to several threads.
_INTEGERS = (
    'dt_image dt_row dt_column dt_order BC_image BC_row BC_column BC_order height width channels rank states orders '
    'walks walk walks_here bands edge half kind draw_orders'
).split()


@triton.jit
def _directions(order, height, width, row, column, WIDE: tl.constexpr):
    """Where a walk begins in a map of these strides, and how far on its next line and its next column are."""
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    start = tl.where(order >= 2, (height - 1) * row + (width - 1) * column, 0)
    sign = tl.where(order >= 2, -1, 1)
    return start, tl.where(order % 2 == 0, row, column) * sign, tl.where(order % 2 == 0, column, row) * sign


@triton.jit
def _bounds(order, height, width, band, bands, NDIM: tl.constexpr):
    """The columns of a line, the lines of a band, and the places of a line that it has: in 1-D the walk is one line."""
    lines = tl.where(order % 2 == 0, height, width)
    columns = tl.where(order % 2 == 0, width, height)
    if NDIM == 1:
        lines *= columns
    first = band * tl.cdiv(lines, bands)
    last = tl.minimum(first + tl.cdiv(lines, bands), lines)
    if NDIM == 1:
        return columns, 0, 1, first, last
    return columns, first, last, 0, columns


@triton.jit
def _offset(start, step_line, step_column, line, place, columns, NDIM: tl.constexpr):
    """Where a place of a line lies; in 1-D places count through all lines."""
    if NDIM == 1:
        return start + place // columns * step_line + place % columns * step_column
    return start + line * step_line + place * step_column
