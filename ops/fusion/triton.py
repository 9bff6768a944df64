# SPDX-License-Identifier: Apache-2.0
"""The state fusion on CUDA, as Triton kernels. Imported when the first CUDA tensor arrives.

A program owns BLOCK_E channels of P positions. A thread takes several channels of a position at once, so that what it
finds out of the position is shared among them.

A position of the border also stands for all that lies beyond it, and so collects the gradients of all positions that
look there. Along a row that is the sum of the first, or last, d + 1 columns for a tap at distance d: `_edge_sums` finds
it once for each row, and the border reads it in place of a column. Between rows the sum is a loop, which takes one step
in all rows but the first and the last. There are no atomics: the same input gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import LAUNCH, check_precision

# Sizes are no reason to compile again, unless channels are a multiple of 16: then a lane takes several at once.
_INTEGERS = ('height', 'width', 'positions', 'rows', 'groups')


@triton.jit
def _tap(row, column, weight, e, is_channel, channels):
    """What a tap adds: a weight, [1, E] or [P, E], times what every position sees of the map, [P, E].

    row: Pointers to the row that each position looks at, [P, 1].
    column: Column there, [P].
    """
    value = tl.load(row + (column * channels)[:, None] + e[None, :], is_channel[None, :])
    return weight * value.to(tl.float32)


@triton.jit
def _load_weight(ptr, d, u, v, e, is_channel, channels):
    """The weights of a tap, [1, E]; ptr (3, 3, 3, E): dilation, row, column, channel."""
    return tl.load(ptr + (9 * d + 3 * u + v) * channels + e, is_channel, 0.0)[None, :]


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_forward(
    h_ptr,
    weight_ptr,
    y_ptr,
    height,
    width,
    channels,
    positions,
    EVEN: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y[p] = sum of weight[tap] h[p + tap, moved onto the map]. Grid: blocks of P positions x blocks of channels."""
    blocks = tl.cdiv(channels, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    is_channel = (e < channels) | EVEN
    position = tl.program_id(0).to(tl.int64) // blocks * P + tl.arange(0, P)
    is_position = position < positions
    line = tl.minimum(position, positions - 1) // width
    row, column = (line % height).to(tl.int32), (tl.minimum(position, positions - 1) - line * width).to(tl.int32)
    image_ = h_ptr + ((line - row) * width * channels)[:, None]
    # The tap in the middle is the same place at every dilation.
    middle = _load_weight(weight_ptr, 0, 1, 1, e, is_channel, channels)
    middle += _load_weight(weight_ptr, 1, 1, 1, e, is_channel, channels)
    middle += _load_weight(weight_ptr, 2, 1, 1, e, is_channel, channels)
    y = _tap(image_ + (row * width * channels)[:, None], column, middle, e, is_channel, channels)
    for d in tl.static_range(3):
        left, right = tl.maximum(column - 2 * d - 1, 0), tl.minimum(column + 2 * d + 1, width - 1)
        for u in tl.static_range(3):
            source = tl.minimum(tl.maximum(row + (u - 1) * (2 * d + 1), 0), height - 1)
            row_ = image_ + (source * width * channels)[:, None]
            y += _tap(row_, left, _load_weight(weight_ptr, d, u, 0, e, is_channel, channels), e, is_channel, channels)
            if u != 1:
                weight = _load_weight(weight_ptr, d, u, 1, e, is_channel, channels)
                y += _tap(row_, column, weight, e, is_channel, channels)
            y += _tap(row_, right, _load_weight(weight_ptr, d, u, 2, e, is_channel, channels), e, is_channel, channels)
    tl.store(y_ptr + (position * channels)[:, None] + e[None, :], y, is_position[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def _edge_sums(grad_ptr, sums_ptr, width, channels, rows, EVEN: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sums over the first and over the last d + 1 columns of every row, d = 1, 3, 5: (3, 2, rows, E)."""
    blocks = tl.cdiv(channels, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    is_channel = (e < channels) | EVEN
    grad_ptr += line * width * channels + e
    first, last = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    for i in tl.static_range(6):
        inside = is_channel & (i < width)
        first += tl.load(grad_ptr + i * channels, mask=inside, other=0.0).to(tl.float32)
        last += tl.load(grad_ptr + (width - 1 - i) * channels, mask=inside, other=0.0).to(tl.float32)
        if i % 2 == 1:
            sums_ = sums_ptr + (i // 2 * 2 * rows.to(tl.int64) + line) * channels + e
            tl.store(sums_, first, mask=is_channel)
            tl.store(sums_ + rows.to(tl.int64) * channels, last, mask=is_channel)


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
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dh[q] = sum over taps of weight[tap] times the sum of dy[p] over all p whose p + tap, moved onto the map, is q.

    A program owns P neighbouring columns of one row. Grid: rows of all images x chunks of columns x blocks of channels.

    sums_ptr: The sums that `_edge_sums` has written, (3, 2, rows, E).
    """
    blocks, chunks = tl.cdiv(channels, BLOCK_E), tl.cdiv(width, P)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    is_channel = (e < channels) | EVEN
    line = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    row, column = (line % height).to(tl.int32), tl.program_id(0) // blocks % chunks * P + tl.arange(0, P)
    first_line = line - row  # of the image
    dh = tl.zeros([P, BLOCK_E], tl.float32)
    for d in tl.static_range(3):
        for u in tl.static_range(3):
            distance = (u - 1) * (2 * d + 1)
            lowest = tl.maximum(tl.where(row == 0, 0, row - distance), 0)
            highest = tl.minimum(tl.where(row == height - 1, height - 1, row - distance), height - 1)
            for source in range(lowest, highest + 1):
                grad_ = grad_ptr + (first_line + source) * width * channels
                sums_ = sums_ptr + (2 * d * rows.to(tl.int64) + first_line + source) * channels
                for v in tl.static_range(3):
                    from_column = column - (v - 1) * (2 * d + 1)
                    inside = (from_column >= 0) & (from_column < width)
                    ptr = grad_ + (from_column * channels)[:, None] + e[None, :]
                    value = tl.load(ptr, inside[:, None] & is_channel[None, :], 0.0).to(tl.float32)
                    if v != 1:  # at the border the sum of columns, which holds the one at this distance too
                        is_border = column == (0 if v == 0 else width - 1)
                        ptr = sums_ + (0 if v == 0 else rows.to(tl.int64) * channels) + e
                        edge = tl.load(ptr, is_channel, 0.0)
                        value = tl.where(is_border[:, None], edge[None, :], value)
                    dh += _load_weight(weight_ptr, d, u, v, e, is_channel, channels) * value
    at = (column * channels)[:, None] + e[None, :]
    tl.store(dh_ptr + line * width * channels + at, dh, (column < width)[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_backward_weight(
    grad_ptr,
    h_ptr,
    dweight_ptr,
    height,
    width,
    channels,
    positions,
    groups,
    EVEN: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Three taps side by side, for one group of positions: dweight (groups, 9, 3, E).

    Grid: groups x 9 x blocks of channels.
    """
    blocks = tl.cdiv(channels, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    is_channel = (e < channels) | EVEN
    tap = tl.program_id(0) // blocks % 9  # dilation and row
    group = tl.program_id(0) // blocks // 9
    distance = tap // 3 * 2 + 1
    left, middle = tl.zeros([P, BLOCK_E], tl.float32), tl.zeros([P, BLOCK_E], tl.float32)
    right = tl.zeros([P, BLOCK_E], tl.float32)
    for chunk in range(group, tl.cdiv(positions, P), groups):
        position = chunk * P + tl.arange(0, P).to(tl.int64)
        is_position = position < positions
        position = tl.minimum(position, positions - 1)
        line = position // width
        row, column = (line % height).to(tl.int32), (position - line * width).to(tl.int32)
        mask = is_position[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + (position * channels)[:, None] + e[None, :], mask, 0.0).to(tl.float32)
        source = tl.minimum(tl.maximum(row + (tap % 3 - 1) * distance, 0), height - 1)
        row_ = h_ptr + ((line - row + source) * width * channels)[:, None]
        left += _tap(row_, tl.maximum(column - distance, 0), grad, e, is_channel, channels)
        middle += _tap(row_, column, grad, e, is_channel, channels)
        right += _tap(row_, tl.minimum(column + distance, width - 1), grad, e, is_channel, channels)
    dweight_ = dweight_ptr + (group.to(tl.int64) * 9 + tap) * 3 * channels + e
    tl.store(dweight_, tl.sum(left, 0), mask=is_channel)
    tl.store(dweight_ + channels, tl.sum(middle, 0), mask=is_channel)
    tl.store(dweight_ + 2 * channels, tl.sum(right, 0), mask=is_channel)


def _tile(channels: int, width: int = 64) -> dict[str, int]:
    """The channels and positions of a program, its warps, and how it is launched."""
    block = min(64, max(32, triton.next_power_of_2(channels)))
    P = min(64, max(8, triton.next_power_of_2(width)))
    return dict(P=P, BLOCK_E=block, EVEN=channels % block == 0, num_warps=4, **LAUNCH)


def _weight(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).permute(0, 2, 3, 1).contiguous()  # (3, E, 3, 3) -> [3, 3, 3, E]


def state_fusion_triton(h: Tensor, weight: Tensor) -> Tensor:
    """The operator `vssm::state_fusion` on CUDA, with the same arguments; float64 is left to the reference."""
    check_precision('state_fusion', h)
    batch, height, width, channels = h.shape
    y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    positions = batch * height * width
    with torch.cuda.device_of(h):
        tile = _tile(channels)
        grid = (triton.cdiv(positions, tile['P']) * triton.cdiv(channels, tile['BLOCK_E']),)
        _fusion_forward[grid](h.contiguous(), _weight(weight), y, height, width, channels, positions, **tile)
    return y


def state_fusion_triton_backward(
    grad_y: Tensor, h: Tensor, weight: Tensor, wanted: Sequence[bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """The operator `vssm::state_fusion_backward` on CUDA, with the same arguments; float64 is the reference's."""
    check_precision('state_fusion', h)
    batch, height, width, channels = h.shape
    rows, positions = batch * height, batch * height * width
    grad_y, h_, dh = grad_y.contiguous(), h.contiguous(), torch.empty(h.shape, dtype=h.dtype, device=h.device)
    sums = torch.empty(3, 2, rows, channels, dtype=torch.float32, device=h.device)
    sizes = dict(height=height, width=width, channels=channels)
    with torch.cuda.device_of(h):
        tile = _tile(channels, width)
        blocks = triton.cdiv(channels, tile['BLOCK_E'])
        edges = dict(width=width, channels=channels, rows=rows, EVEN=tile['EVEN'], BLOCK_E=tile['BLOCK_E'])
        _edge_sums[(rows * blocks,)](grad_y, sums, **edges, num_warps=1, **LAUNCH)
        grid = (rows * triton.cdiv(width, tile['P']) * blocks,)
        _fusion_backward[grid](grad_y, sums, _weight(weight), dh, **sizes, rows=rows, **tile)
        tile = _tile(channels)
        groups = min(triton.cdiv(positions, tile['P']), 256 // blocks)
        parts = torch.empty(groups, 3, 3, 3, channels, dtype=torch.float32, device=h.device)
        grid = (groups * 9 * blocks,)
        _fusion_backward_weight[grid](grad_y, h_, parts, **sizes, positions=positions, groups=groups, **tile)
        dweight = parts.sum(0).permute(0, 3, 1, 2)  # [3, 3, 3, E] -> [3, E, 3, 3]
    nothing = grad_y.new_empty(0)
    return dh if wanted[0] else nothing, dweight.to(weight.dtype).contiguous() if wanted[1] else nothing
