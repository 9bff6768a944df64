# SPDX-License-Identifier: Apache-2.0
"""The state fusion on CUDA, as Triton kernels. Imported when the first CUDA tensor arrives.

A program owns R rows of P columns and BLOCK_E channels and keeps the sums of all R rows in registers: a row of the map
that is loaded serves every row of sums that looks there. So the rows of a program, and what of them is beyond the map,
are the same for all its threads, which take several channels of a place each.

In the backward pass a place of the border also stands for all that lies beyond it, and so collects the gradients of all
positions that look there. Along a row that is the sum of the first, or last, d + 1 columns for a tap at distance d:
`_edge_sums` finds it once for each row, in the type of the map, and the border reads it in place of a column. Between
rows it is a sum that the programs at the top and at the bottom add. There are no atomics: the same input gives the same
bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LAUNCH, _choose, at_most
from ..backend import check_precision

# Sizes are no reason to compile again, unless channels are a multiple of 16: then a lane takes several at once.
_INTEGERS = ('height', 'width', 'rows', 'pieces', 'groups')

_OPTIONS = dict(**LAUNCH, **at_most(168))  # with more registers too few warps would fit
# Rows of a program. With two the compiler for AMD takes minutes over one kernel.
_ROWS = 1 if torch.version.hip else 7


@triton.jit
def _widen(value):
    """As float32, whose upper half a bfloat16 is: that takes one instruction, where `to` takes one or two."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _channels(channels, BLOCK_E: tl.constexpr, EVEN: tl.constexpr):
    """Channels of a program, whether they are there, [1, BLOCK_E], and its number among those that have the same."""
    blocks = tl.cdiv(channels, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    return e, (e < channels) | EVEN, tl.program_id(0) // blocks


@triton.jit
def _piece(piece, height, width, R: tl.constexpr, P: tl.constexpr):
    """A piece of R rows and P columns: its first row, how many of its rows another has, columns, [P, 1], and image.

    All R rows are on the map: the last piece begins so much earlier.
    """
    chunks, bands = tl.cdiv(width, P), tl.cdiv(height, R)
    column = piece % chunks * P + tl.arange(0, P)[:, None]
    band = piece // chunks % bands
    row = tl.minimum(band * R, height - R)
    return row, band * R - row, column, (piece // chunks // bands).to(tl.int64)


@triton.jit
def _load_rows(ptr, stride, row, height, mask, D: tl.constexpr, R: tl.constexpr, CLAMP: tl.constexpr):
    """Rows `row` - D to `row` + R + D - 1: a tuple of [P, BLOCK_E]; those beyond the map are the nearest, or zeros.

    ptr: Pointers to the places of row `row`, [P, BLOCK_E].
    stride: Elements from a row to the next.
    """
    values = ()
    ptr -= (tl.minimum(D, row) if CLAMP else D) * stride
    for i in tl.static_range(-D, R + D):
        if CLAMP or (i >= 0 and i < R):
            values += (tl.load(ptr, mask, 0.0),)  # type: ignore[assignment]
        else:
            values += (tl.load(ptr, mask & (row + i >= 0 if i < 0 else row + i < height), 0.0),)  # type: ignore[assignment]
        if not CLAMP or (i >= 0 and i < R - 1):
            ptr += stride
        else:
            ptr += tl.where(row + i >= 0 if i < 0 else row + i < height - 1, stride, 0)
    return values


@triton.jit
def _add(sums, weight, value, TO: tl.constexpr):
    """sums[TO] += weight value, if there is such a row."""
    if TO >= 0 and TO < len(sums):
        return sums[:TO] + (sums[TO] + weight * value,) + sums[TO + 1 :]
    return sums


@triton.jit
def _load_weights(ptr, d, v, e, is_channel, channels):
    """The three taps of a column, each [1, BLOCK_E]; ptr (3, 3, 3, E): dilation, row, column, channel."""
    ptr += (9 * d + v) * channels + e
    first, second = tl.load(ptr, is_channel, 0.0), tl.load(ptr + 3 * channels, is_channel, 0.0)
    return first, second, tl.load(ptr + 6 * channels, is_channel, 0.0)


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_forward(
    h_ptr,
    weight_ptr,
    y_ptr,
    height,
    width,
    channels,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y[p] = sum of weight[tap] h[p + tap, moved onto the map]. Grid: pieces of all images x blocks of channels."""
    e, is_channel, piece = _channels(channels, BLOCK_E, EVEN)
    row, shared, column, image = _piece(piece, height, width, R, P)
    begin, stride = (image * height + row) * width * channels, width * channels
    y = (tl.zeros([P, BLOCK_E], tl.float32),) * R
    for d in tl.static_range(3):
        for v in range(3):  # one after another, for the sake of registers and of code
            w = _load_weights(weight_ptr, d, v, e, is_channel, channels)
            source = tl.minimum(tl.maximum(column + (v - 1) * (2 * d + 1), 0), width - 1)
            h_ = h_ptr + begin + (source * channels + e)
            values = _load_rows(h_, stride, row, height, is_channel, 2 * d + 1, R, True)
            for i in tl.static_range(len(values)):
                value = _widen(values[i])
                for u in tl.static_range(3):
                    y = _add(y, w[u], value, i - u * (2 * d + 1))
    mask = is_channel & (column < width)
    for i in tl.static_range(R):
        tl.store(y_ptr + begin + ((i * width + column) * channels + e), y[i], mask & (i >= shared))


@triton.jit(do_not_specialize=_INTEGERS)
def _edge_sums(grad_ptr, sums_ptr, width, channels, rows, EVEN: tl.constexpr, P: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sums over the first and over the last d + 1 columns of every row, d = 1, 3, 5: (3, 2, rows, E).

    Grid: blocks of P rows x blocks of channels.
    """
    e, is_channel, block = _channels(channels, BLOCK_E, EVEN)
    line = block.to(tl.int64) * P + tl.arange(0, P)[:, None]
    mask = is_channel & (line < rows)
    grad_ptr += line * width * channels + e
    sums_ptr += line * channels + e
    size = rows.to(tl.int64) * channels
    first, last = tl.zeros([P, BLOCK_E], tl.float32), tl.zeros([P, BLOCK_E], tl.float32)
    for i in tl.static_range(6):
        first += _widen(tl.load(grad_ptr + i * channels, mask & (i < width), 0.0))
        last += _widen(tl.load(grad_ptr + (width - 1 - i) * channels, mask & (i < width), 0.0))
        if i % 2 == 1:
            tl.store(sums_ptr + (i - 1) * size, first, mask)
            tl.store(sums_ptr + i * size, last, mask)


@triton.jit
def _add_beyond(sums, ptr, stride, weight, mask, height, D: tl.constexpr, TO: tl.constexpr):
    """sums[TO] += weight times the sum of D rows from ptr on."""
    beyond = _widen(tl.load(ptr, mask, 0.0))
    for i in tl.static_range(1, D):
        beyond += _widen(tl.load(ptr + i * stride, mask & (i < height), 0.0))
    return _add(sums, weight, beyond, TO)


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_backward(
    grad_ptr,
    sums_ptr,
    weight_ptr,
    dh_ptr,
    height,
    width,
    channels,
    rows,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dh[q] = sum over taps of weight[tap] times the sum of dy[p] over all p whose p + tap, moved onto the map, is q.

    sums_ptr: What `_edge_sums` has written. Grid: pieces of all images x blocks of channels.
    """
    e, is_channel, piece = _channels(channels, BLOCK_E, EVEN)
    row, shared, column, image = _piece(piece, height, width, R, P)
    line = image * height + row
    dh = (tl.zeros([P, BLOCK_E], tl.float32),) * R
    for d in tl.static_range(3):
        for v in range(3):
            w = _load_weights(weight_ptr, d, v, e, is_channel, channels)
            source = column - (v - 1) * (2 * d + 1)
            is_edge = ((v == 0) & (column == 0)) | ((v == 2) & (column == width - 1))
            edge = ((2 * d + v // 2) * rows.to(tl.int64) + line) * channels + e
            grad_ = _choose(is_edge, sums_ptr + edge, grad_ptr + (line * width + source) * channels + e)
            stride = tl.where(is_edge, channels, width * channels)
            mask = is_channel & (is_edge | (source >= 0) & (source < width))
            values = _load_rows(grad_, stride, row, height, mask, 2 * d + 1, R, False)
            for i in tl.static_range(len(values)):
                value = _widen(values[i])
                for u in tl.static_range(3):
                    dh = _add(dh, w[u], value, i + (u - 2) * (2 * d + 1))
            if row == 0:
                dh = _add_beyond(dh, grad_, stride, w[0], mask, height, 2 * d + 1, 0)
            if row == height - R:
                dh = _add_beyond(dh, grad_ + (R - 1) * stride, -stride, w[2], mask, height, 2 * d + 1, R - 1)
    mask = is_channel & (column < width)
    for i in tl.static_range(R):
        dh_ = dh_ptr + line * width * channels + ((i * width + column) * channels + e)
        tl.store(dh_, dh[i], mask & (i >= shared))


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_backward_weight(
    grad_ptr,
    h_ptr,
    dweight_ptr,
    height,
    width,
    channels,
    pieces,
    groups,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Nine taps, those of a column of each dilation, of the pieces of one group: dweight (groups, 3, 3, 3, E).

    Grid: groups x 3 columns of taps x blocks of channels.
    """
    e, is_channel, group = _channels(channels, BLOCK_E, EVEN)
    v, group = group % 3, group // 3
    dweight = (tl.zeros([P, BLOCK_E], tl.float32),) * 9
    for piece in range(group, pieces, groups):
        row, shared, column, image = _piece(piece, height, width, R, P)
        begin, stride = (image * height + row) * width * channels, width * channels
        mask = is_channel & (column < width)
        grads = ()
        for i in tl.static_range(R):
            grad_ = grad_ptr + begin + ((i * width + column) * channels + e)
            grads += (_widen(tl.load(grad_, mask & (i >= shared), 0.0)),)  # type: ignore[assignment]
        for d in tl.static_range(3):
            source = tl.minimum(tl.maximum(column + (v - 1) * (2 * d + 1), 0), width - 1)
            h_ = h_ptr + begin + (source * channels + e)
            values = _load_rows(h_, stride, row, height, is_channel, 2 * d + 1, R, True)
            for i in tl.static_range(R):
                for u in tl.static_range(3):
                    dweight = _add(dweight, grads[i], _widen(values[i + u * (2 * d + 1)]), 3 * d + u)
    dweight_ptr += (group.to(tl.int64) * 27 + v) * channels + e
    for tap in tl.static_range(9):
        tl.store(dweight_ptr + 3 * tap * channels, tl.sum(dweight[tap], 0, keep_dims=True), is_channel)


def _tile(channels: int, height: int, width: int) -> dict[str, int]:
    """The channels, rows and columns of a program, and its warps."""
    block = min(64, max(32, triton.next_power_of_2(channels)))
    P = 8 if width <= 8 else 16
    return dict(R=min(_ROWS, height), P=P, BLOCK_E=block, EVEN=channels % block == 0, num_warps=P * block // 256)


def _pieces(h: Tensor, tile: dict[str, int]) -> int:
    """Pieces of a map, (batch, H, W, E), that programs own."""
    return h.shape[0] * triton.cdiv(h.shape[1], tile['R']) * triton.cdiv(h.shape[2], tile['P'])


def _weight(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).permute(0, 2, 3, 1).contiguous()  # (3, E, 3, 3) -> [3, 3, 3, E]


def state_fusion_triton(h: Tensor, weight: Tensor) -> Tensor:
    """The operator `vssm::state_fusion` on CUDA, with the same arguments; float64 is left to the reference."""
    check_precision('state_fusion', h)
    _, height, width, channels = h.shape
    y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    with torch.cuda.device_of(h):
        tile = _tile(channels, height, width)
        grid = (_pieces(h, tile) * triton.cdiv(channels, tile['BLOCK_E']),)
        _fusion_forward[grid](h.contiguous(), _weight(weight), y, height, width, channels, **tile, **_OPTIONS)
    return y


def state_fusion_triton_backward(
    grad_y: Tensor, h: Tensor, weight: Tensor, wanted: Sequence[bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """The operator `vssm::state_fusion_backward` on CUDA, with the same arguments; float64 is the reference's."""
    check_precision('state_fusion', h)
    batch, height, width, channels = h.shape
    grad_y, h_, weight_ = grad_y.contiguous(), h.contiguous(), _weight(weight)
    dh = dweight = grad_y.new_empty(0)
    sizes = dict(height=height, width=width, channels=channels)
    tile = _tile(channels, height, width)
    tile['num_warps'] *= h.element_size() // 2  # fewer channels a thread where each takes a register
    blocks, pieces = triton.cdiv(channels, tile['BLOCK_E']), _pieces(h, tile)
    with torch.cuda.device_of(h):
        if wanted[0]:
            rows = batch * height
            sums = grad_y.new_empty(3, 2, rows, channels)
            edges = dict(width=width, channels=channels, rows=rows, EVEN=tile['EVEN'], P=16, BLOCK_E=tile['BLOCK_E'])
            _edge_sums[(triton.cdiv(rows, 16) * blocks,)](grad_y, sums, **edges, num_warps=4, **LAUNCH)
            dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
            grid = (pieces * blocks,)
            _fusion_backward[grid](grad_y, sums, weight_, dh, **sizes, rows=rows, **tile, **_OPTIONS)
        if wanted[1]:
            groups = min(pieces, max(1, 1024 // (3 * blocks)))
            parts = torch.empty(groups, 3, 3, 3, channels, dtype=torch.float32, device=h.device)
            grid, sizes = (groups * 3 * blocks,), dict(**sizes, pieces=pieces, groups=groups)
            _fusion_backward_weight[grid](grad_y, h_, parts, **sizes, **tile, **_OPTIONS)
            dweight = parts.sum(0).permute(0, 3, 1, 2).to(weight.dtype).contiguous()  # [3, 3, 3, E] -> [3, E, 3, 3]
    return dh, dweight
