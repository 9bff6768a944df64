# SPDX-License-Identifier: Apache-2.0
"""The state fusion on CUDA, as Triton kernels. Imported when the first CUDA tensor arrives.

A program owns BLOCK_E channels and P neighbouring columns of one row: lanes are channels, which lie side by side.

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

from ..backend import check_precision

BLOCK_E = 32

# Sizes are no reason to compile again.
_INTEGERS = ('height', 'width', 'channels', 'rows', 'groups')


@triton.jit
def _tile(height, width, channels, P: tl.constexpr, BLOCK_E: tl.constexpr):
    """What a program owns: channels, row within the batch, row, columns, and whether there are such columns."""
    blocks, chunks = tl.cdiv(channels, BLOCK_E), tl.cdiv(width, P)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    line = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    column = tl.program_id(0) // blocks % chunks * P + tl.arange(0, P)
    return e, line, (line % height).to(tl.int32), column


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_forward(
    h_ptr,
    weight_ptr,
    y_ptr,
    height,
    width,
    channels,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y[p] = sum of weight[tap] h[p + tap, moved onto the map]; weight (3, 3, 3, E): dilation, row, column, channel."""
    e, line, row, column = _tile(height, width, channels, P, BLOCK_E)
    is_channel = e < channels
    first_line = line - row  # of the image
    y = tl.zeros([P, BLOCK_E], tl.float32)
    for d in tl.static_range(3):
        for u in tl.static_range(3):
            source = tl.minimum(tl.maximum(row + (u - 1) * (2 * d + 1), 0), height - 1)
            h_ = h_ptr + (first_line + source) * width * channels
            for v in tl.static_range(3):
                at = tl.minimum(tl.maximum(column + (v - 1) * (2 * d + 1), 0), width - 1) * channels
                weight = tl.load(weight_ptr + (9 * d + 3 * u + v) * channels + e, mask=is_channel, other=0.0)
                h = tl.load(h_ + at[:, None] + e[None, :], mask=is_channel[None, :], other=0.0).to(tl.float32)
                y += weight[None, :] * h
    at = (column * channels)[:, None] + e[None, :]
    tl.store(y_ptr + line * width * channels + at, y, mask=(column < width)[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def _edge_sums(grad_ptr, sums_ptr, width, channels, rows, BLOCK_E: tl.constexpr):
    """The sums over the first and over the last d + 1 columns of every row, d = 1, 3, 5: (3, 2, rows, E)."""
    blocks = tl.cdiv(channels, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    is_channel = e < channels
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
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dh[q] = sum over taps of weight[tap] times the sum of dy[p] over all p whose p + tap, moved onto the map, is q.

    sums_ptr: The sums that `_edge_sums` has written, (3, 2, rows, E).
    """
    e, line, row, column = _tile(height, width, channels, P, BLOCK_E)
    is_channel = e < channels
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
                    value = tl.load(ptr, mask=inside[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
                    if v != 1:  # at the border the sum of columns, which holds the one at this distance too
                        is_border = column == (0 if v == 0 else width - 1)
                        ptr = sums_ + (0 if v == 0 else rows.to(tl.int64) * channels) + e
                        edge = tl.load(ptr, mask=is_channel, other=0.0)
                        value = tl.where(is_border[:, None], edge[None, :], value)
                    weight = tl.load(weight_ptr + (9 * d + 3 * u + v) * channels + e, mask=is_channel, other=0.0)
                    dh += weight[None, :] * value
    at = (column * channels)[:, None] + e[None, :]
    tl.store(dh_ptr + line * width * channels + at, dh, mask=(column < width)[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def _fusion_backward_weight(
    grad_ptr,
    h_ptr,
    dweight_ptr,
    height,
    width,
    channels,
    rows,
    groups,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Three taps side by side, for one group of rows: dweight (groups, 9, 3, E). Grid: groups x 9 x channel blocks."""
    blocks = tl.cdiv(channels, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    tap = tl.program_id(0) // blocks % 9  # dilation and row
    group = (tl.program_id(0) // blocks // 9).to(tl.int64)
    distance = tap // 3 * 2 + 1
    is_channel = e < channels
    left, middle = tl.zeros([P, BLOCK_E], tl.float32), tl.zeros([P, BLOCK_E], tl.float32)
    right = tl.zeros([P, BLOCK_E], tl.float32)
    for line in range(group, rows, groups):
        row = line % height
        source = tl.minimum(tl.maximum(row + (tap % 3 - 1) * distance, 0), height - 1)
        grad_ = grad_ptr + line * width * channels
        h_ = h_ptr + (line - row + source) * width * channels
        for chunk in range(0, width, P):
            column = chunk + tl.arange(0, P)
            mask = (column < width)[:, None] & is_channel[None, :]
            grad = tl.load(grad_ + (column * channels)[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
            at = tl.maximum(column - distance, 0) * channels
            left += grad * tl.load(h_ + at[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
            at = column * channels
            middle += grad * tl.load(h_ + at[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
            at = tl.minimum(column + distance, width - 1) * channels
            right += grad * tl.load(h_ + at[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    dweight_ = dweight_ptr + (group * 9 + tap) * 3 * channels + e
    tl.store(dweight_, tl.sum(left, 0), mask=is_channel)
    tl.store(dweight_ + channels, tl.sum(middle, 0), mask=is_channel)
    tl.store(dweight_ + 2 * channels, tl.sum(right, 0), mask=is_channel)


def _columns(width: int) -> int:
    """The number of columns that a program owns, P."""
    return min(32, max(4, triton.next_power_of_2(width)))


def _weight(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).permute(0, 2, 3, 1).contiguous()  # (3, E, 3, 3) -> [3, 3, 3, E]


def state_fusion_triton(h: Tensor, weight: Tensor) -> Tensor:
    """The operator `vssm::state_fusion` on CUDA, with the same arguments; float64 is left to the reference."""
    check_precision('state_fusion', h)
    batch, height, width, channels = h.shape
    y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    with torch.cuda.device_of(h):
        P = _columns(width)
        grid = (batch * height * triton.cdiv(width, P) * triton.cdiv(channels, BLOCK_E),)
        options = dict(P=P, BLOCK_E=BLOCK_E, num_warps=4)
        _fusion_forward[grid](h.contiguous(), _weight(weight), y, height, width, channels, **options)
    return y


def state_fusion_triton_backward(
    grad_y: Tensor, h: Tensor, weight: Tensor, wanted: Sequence[bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """The operator `vssm::state_fusion_backward` on CUDA, with the same arguments; float64 is the reference's."""
    check_precision('state_fusion', h)
    batch, height, width, channels = h.shape
    rows, blocks = batch * height, triton.cdiv(channels, BLOCK_E)
    groups = min(rows, 64)
    grad_y, h_, dh = grad_y.contiguous(), h.contiguous(), torch.empty(h.shape, dtype=h.dtype, device=h.device)
    sums = torch.empty(3, 2, rows, channels, dtype=torch.float32, device=h.device)
    parts = torch.empty(groups, 3, 3, 3, channels, dtype=torch.float32, device=h.device)
    P = _columns(width)
    sizes = dict(width=width, channels=channels, rows=rows)
    # Left to itself, the compiler spills a few registers of the backward pass for occupancy.
    options = dict(height=height, P=P, BLOCK_E=BLOCK_E, num_warps=4, maxnreg=255, **sizes)
    with torch.cuda.device_of(h):
        _edge_sums[(rows * blocks,)](grad_y, sums, **sizes, BLOCK_E=BLOCK_E, num_warps=1)
        grid = (rows * triton.cdiv(width, P) * blocks,)
        _fusion_backward[grid](grad_y, sums, _weight(weight), dh, **options)
        _fusion_backward_weight[(groups * 9 * blocks,)](grad_y, h_, parts, groups=groups, **options)
        dweight = parts.sum(0).permute(0, 3, 1, 2)  # [3, 3, 3, E] -> [3, E, 3, 3]
    nothing = grad_y.new_empty(0)
    return dh if wanted[0] else nothing, dweight.to(weight.dtype).contiguous() if wanted[1] else nothing
