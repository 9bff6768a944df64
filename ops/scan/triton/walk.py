# SPDX-License-Identifier: Apache-2.0
"""What a program scans: its part of a tensor, the places of a walk in a map, and what lies at them.

A place is a position of a map, counted along rows and over the images of a batch. At each lie a row of x, of E numbers,
and K rows of dt, of B and of C, at an equal distance (`dt_row`, `BC_row`).
"""

import triton
import triton.language as tl

from ..._triton import _choose
from . import tiles
from .steps import _load_weight

BLOCK_E = tl.constexpr(tiles.BLOCK_E)

# Sizes and distances are no reason to compile again. Nor may the compiler use that they are multiples of 16: it would
# give a thread several channels side by side, and the places of one warp to several threads.
_INTEGERS = 'dt_row BC_row height width channels rank states orders walks walk walks_here kind'.split()
# Nor are addresses, whose alignment changes with the rank of the steps.
_TENSORS = 'x dt B C parameters sum y edges grad before from_line from_place dx draw parts dparams'
_POINTERS = [f'{name}_ptr' for name in _TENSORS.split()]


@triton.jit
def _program(channels, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """The image of a program, of how many, its channels, and which of these there are.

    Grid: batch x blocks of channels, bands. With WIDE, where a tensor has too many elements for less, what is counted
    from the image on takes 64 bits.
    """
    blocks = tl.cdiv(channels, BLOCK_E)
    image, images = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    if WIDE:
        image, images = image.to(tl.int64), images.to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    return image, images, e, (e < channels) | EVEN


@triton.jit
def _edges(image, images, size, e):
    """Where a program keeps what leaves its strips and its band, and how many numbers all programs keep.

    So many are first the states that leave a strip, in 2-D; then, where walks are cut into bands, the products of a
    over a band; then the states that leave it. Of two orders each is there twice.

    size: Numbers of a band, for each column and channel one.
    """
    return (image * tl.num_programs(1) + tl.program_id(1)) * size + e, images * tl.num_programs(1) * size


@triton.jit
def _directions(order, image, height, width):
    """Lines and columns of a walk, the place where it begins, and how far its next line and its next column are."""
    sign, along_rows = tl.where(order >= 2, -1, 1), order % 2 == 0
    lines, columns = tl.where(along_rows, height, width), tl.where(along_rows, width, height)
    start = image * height * width + tl.where(order >= 2, height * width - 1, 0)
    return lines, columns, start, tl.where(along_rows, width, 1) * sign, tl.where(along_rows, 1, width) * sign


@triton.jit
def _band(size):
    """Begin and end of a program's band of so many lines or places."""
    length = tl.cdiv(size, tl.num_programs(1))
    begin = tl.program_id(1) * length
    return begin, tl.minimum(begin + length, size)


@triton.jit
def _first(begin, columns, start, step_line, step_column):
    """Place number `begin` of a 1-D walk, which goes through all lines, and its column; and, for `_after`, of a line
    the columns, 2^16 over these, rounded up, how far a column is, and how far beyond its last the next line begins."""
    column = begin % columns
    place = start + begin // columns * step_line + column * step_column
    return place, column, (columns, (65535 + columns) // columns, step_column, step_line - columns * step_column)


@triton.jit
def _after(place, column, line, offset, MOST: tl.constexpr):
    """The place that comes `offset` places later in a 1-D walk, at most MOST, and its column.

    A division for each place would take as long as all else. But few lines end meanwhile: one or none, or, where they
    are shorter than MOST, as many as a product with the reciprocal says, exactly for numbers as small as these.
    """
    tl.static_assert(MOST <= 128, 'of no more is the product exact')
    columns, reciprocal, step, wrap = line
    column += offset
    ended = tl.where(columns < MOST, (column * reciprocal) >> 16, (column >= columns).to(tl.int32))
    return place + offset * step + ended * wrap, column - ended * columns


@triton.jit
def _parameters(ptr, k, n, e, is_channel, channels, rank, states, RANK: tl.constexpr, HALVES: tl.constexpr):
    """A, D, which the walk of the first state adds, and the bias and weights of the steps, of order k and state n.

    ptr: Parameters of the channels, (K, N + 2 + R, E): A of all states, D, bias, weights.
    """
    ptr += k * (states + 2 + rank) * channels
    A = tl.load(ptr + n * channels + e, mask=is_channel, other=0.0)
    ptr += states * channels
    D = tl.load(ptr + e, mask=is_channel & (n == 0), other=0.0)
    bias = tl.load(ptr + channels + e, mask=is_channel, other=0.0)
    weight = 0
    if RANK > 0:
        weight = _load_weight(ptr + 2 * channels, e, is_channel, channels, rank, RANK, HALVES)
    return A, D, bias, weight


@triton.jit
def _load_BC(B_ptr, C_ptr, at, BC_row, is_place, ORDERS: tl.constexpr, S: tl.constexpr, J: tl.constexpr):
    """B and C of a tile's places, [S, J, ORDERS] each.

    at: Where B and C of the places lie, [S J].
    is_place: Whether there is such a place, [S J].
    """
    # Padded, with what is not read, to a number for each thread: of fewer, every lane would load all for itself.
    PAD: tl.constexpr = max(1, 16 // (J * ORDERS))
    is_read = is_place[:, None, None, None] & (tl.arange(0, PAD)[None, :, None, None] == 0)
    order, is_C = tl.arange(0, ORDERS)[None, None, :, None], tl.arange(0, 2)[None, None, None, :] == 1
    ptr = _choose(is_C, C_ptr, B_ptr) + order * BC_row + at[:, None, None, None]
    BC = tl.load(ptr, is_read, 0.0).to(tl.float32)
    return tl.split(tl.reshape(tl.sum(BC, 1), (S, J, ORDERS, 2)))
