# SPDX-License-Identifier: Apache-2.0
"""Where the places of a walk lie in memory, and the parameters of a walk."""

import triton
import triton.language as tl

from .steps import _load_weight

# Sizes and strides are no reason to compile again. Nor may the compiler use that they are multiples of 16: it would
# give a thread several channels side by side, and the places of one warp to several threads.
_INTEGERS = (
    'dt_image dt_row dt_column dt_order BC_image BC_row BC_column BC_order height width channels rank states orders '
    'walks walk walks_here bands edge half kind draw_orders'
).split()
# Nor are addresses, whose alignment changes with the rank of the steps.
_POINTERS = [
    f'{name}_ptr'
    for name in (
        'x dt A B C D bias weight sum y left carry grad before from_line from_place dx draw parts dparams'
    ).split()
]


@triton.jit
def _choose(is_first, first_ptr, second_ptr):
    """Pointers to one of two tensors of one type; as integers, for pointers are what Triton for AMD cannot choose."""
    return tl.where(is_first, first_ptr.to(tl.int64), second_ptr.to(tl.int64)).to(first_ptr.dtype)


@triton.jit
def _directions(order, height, width, row, column, WIDE: tl.constexpr):
    """Where a walk begins in a map of these strides, and how far on its next line and its next column are."""
    sign = tl.where(order >= 2, -1, 1)
    if WIDE:
        height, width, sign = height.to(tl.int64), width.to(tl.int64), sign.to(tl.int64)
    start = tl.where(order >= 2, (height - 1) * row + (width - 1) * column, 0)
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
def _offset(start, step_line, step_column, place, columns):
    """Where a place of a 1-D walk lies, which counts through all lines."""
    return start + place // columns * step_line + place % columns * step_column


@triton.jit
def _parameters(
    A_ptr,
    D_ptr,
    bias_ptr,
    weight_ptr,
    k,
    n,
    e,
    is_channel,
    channels,
    rank,
    states,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    HALVES: tl.constexpr,
):
    """A, D, which the walk of the first state adds, and the bias and weights of the steps, of order k and state n."""
    lanes = k * channels + e
    A = tl.load(A_ptr + lanes * states + n, mask=is_channel, other=0.0)
    D, bias = tl.zeros_like(A), tl.zeros_like(A)
    if HAS_D:
        D = tl.load(D_ptr + lanes, mask=is_channel & (n == 0), other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=is_channel, other=0.0)
    weight = 0
    if RANK > 0:
        weight = _load_weight(weight_ptr + k * rank * channels, e, is_channel, channels, rank, RANK, HALVES)
    return A, D, bias, weight
