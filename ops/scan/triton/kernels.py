# SPDX-License-Identifier: Apache-2.0
"""The selective scan on CUDA, as Triton kernels. Imported when the first CUDA tensor arrives.

A lane is a channel: what lies side by side in memory is read by lanes side by side. A program owns BLOCK_E channels
of one image. Its S warps stand side by side on a line of the walk, J places each, as a tile (S, J, BLOCK_E): the places
of a warp are registers of its threads, so that a recurrence is a chain of multiply-adds, and the warps are stitched by
what each makes of the state that enters it. A line of more than S J places is walked in strips: a 2-D scan takes all
lines of a strip before the next strip, keeps the states of the line above in registers, and hands the inner recurrence
on through one number a line and channel in memory.

A walk is one order and one state. The walks of a program follow one another and add to the same output, so that neither
the map nor what is made of it is ever written in several orders. Where images and channels are too few to fill the
device, the walk is cut into bands: one launch finds what every band makes of the state that enters it, `_stitch` passes
the states on, and a second launch scans all bands side by side.

The backward pass writes the states of one walk at a time, then follows that walk backwards, along the opposite order.
Sums over channels and over images are written in parts and added afterwards: there are no atomics, and the same tile
gives the same bits. The gradients of low-rank steps are PyTorch's matrix products, and follow its setting of TF32.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backend import check_precision

LOG2E = tl.constexpr(1.4426950408889634)

# ---- recurrences -----------------------------------------------------------------------------------------------------


@triton.jit
def _compose(a1, b1, a2, b2):
    """The map h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _compose_entering(a1, b1, p1, q1, a2, b2, p2, q2):
    """As `_compose`; h -> p h + q gives the state that enters the last step."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def _scan_line(a, b, carry, J: tl.constexpr, S: tl.constexpr, BLOCK_E: tl.constexpr):
    """h = a h_before + b along a line, the state `carry`, [E], entering it.

    Place j of warp s stands at [s, j] of a and b, [S, J, E]. Returns the states and the states before each place,
    [S, J, E]; the last state and the product of all a, [E].
    """
    j = tl.arange(0, J)[None, :, None]
    # What every warp makes of the state that enters it, and from that the state that does.
    decay, state = tl.associative_scan((a, b), 1, _compose)
    decay = tl.sum(tl.where(j == J - 1, decay, 0.0), 1)  # [S, E]
    state = tl.sum(tl.where(j == J - 1, state, 0.0), 1)
    one, zero = tl.full([S, BLOCK_E], 1.0, tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    decay, state, p, q = tl.associative_scan((decay, state, one, zero), 0, _compose_entering)
    entering = (p * carry[None, :] + q)[:, None, :]
    is_last = tl.arange(0, S)[:, None] == S - 1
    product = tl.sum(tl.where(is_last, decay, 0.0), 0)
    leaving = tl.sum(tl.where(is_last, decay * carry[None, :] + state, 0.0), 0)

    b = tl.where(j == 0, b + a * entering, b)
    one = tl.full([S, J, BLOCK_E], 1.0, tl.float32)
    before = tl.where(j == 0, entering, 0.0 * one)
    _, state, _, before = tl.associative_scan((a, b, one, before), 1, _compose_entering)
    return state, before, leaving, product


@triton.jit
def _stitch(carry_ptr, half, bands, size, BLOCK: tl.constexpr):
    """Turn the states that leave the bands into those that enter them, in place; columns beyond a short line are void.

    carry_ptr: (2, batch, bands, size), first the products of a over a band, then the states that leave it.
    half: Elements of one of the two.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    ptr = carry_ptr + tl.program_id(1).to(tl.int64) * bands * size + i
    entering = tl.zeros([BLOCK], tl.float32)
    for _ in range(bands):
        product = tl.load(ptr, mask=mask, other=0.0)
        leaving = tl.load(ptr + half, mask=mask, other=0.0)
        tl.store(ptr + half, entering, mask=mask)
        entering = product * entering + leaving
        ptr += size


# ---- places and steps ------------------------------------------------------------------------------------------------


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


@triton.jit
def _softplus(v):
    """softplus(v) = max(v, 0) + log1p(u) with u = exp(-|v|), and its derivative.

    log1p(u) = u q(u) with a polynomial q, within 2e-7: the card's logarithm is inaccurate where its argument is near 1.
    """
    u = tl.exp2(-tl.abs(v) * LOG2E)
    q = 0.0051058256067335606 * u - 0.028991956263780594
    q = q * u + 0.07738073915243149
    q = q * u - 0.13590599596500397
    q = q * u + 0.1907130926847458
    q = q * u - 0.2483394593000412
    q = q * u + 0.3331793546676636
    q = q * u - 0.4999943673610687
    q = q * u + 0.9999999403953552
    return tl.maximum(v, 0.0) + u * q, tl.where(v >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def _load_steps(
    like,
    dt_ptr,
    at,
    weight_ptr,
    bias,
    e,
    is_channel,
    is_place,
    channels,
    rank,
    SOFTPLUS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The step sizes of a tile, 0 where there is no place, and their derivative, [S, J, E].

    like: A tile as it was loaded; sums begin with it, less itself, so that the compiler lays them out as it.
    at: Where the step sizes of the places lie, [S, J].
    weight_ptr: The weights of low-rank steps, (R, E).
    """
    if LOW_RANK:
        raw = bias[None, None, :] + (like - like)
        for r in tl.range(0, rank, loop_unroll_factor=4):
            low = tl.load(dt_ptr + at + r).to(tl.float32)
            weight = tl.load(weight_ptr + r * channels + e, mask=is_channel, other=0.0)
            raw = raw + low[:, :, None] * weight[None, None, :]
    else:
        raw = tl.load(dt_ptr + at[:, :, None] + e[None, None, :], mask=is_channel[None, None, :], other=0.0)
        raw = raw.to(tl.float32) + bias[None, None, :]
    step, slope = raw, 1.0
    if SOFTPLUS:
        step, slope = _softplus(raw)
    return tl.where(is_place[:, :, None], step, 0.0), slope


# ---- forward ---------------------------------------------------------------------------------------------------------

# Sizes and strides are no reason to compile again. Nor may the compiler use that they are multiples of 16: it would
# give a thread several channels side by side, and the places of one warp to several threads.
_INTEGERS = (
    'dt_image dt_row dt_column dt_order BC_image BC_row BC_column BC_order height width channels rank states orders '
    'walks walk walks_here bands edge half kind draw_orders'
).split()


@triton.jit(do_not_specialize=_INTEGERS)
def _scan_forward(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    left_ptr,
    carry_ptr,
    dt_image,
    dt_row,
    dt_column,
    dt_order,
    BC_image,
    BC_row,
    BC_column,
    BC_order,
    height,
    width,
    channels,
    rank,
    states,
    orders,
    walks,
    bands,
    edge,
    half,
    kind,  # of launch, for the autotuner
    walk,
    walks_here,
    NDIM: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMMARY: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
):
    """Add `walks_here` walks from `walk` on to y, or without C write states; with SUMMARY find what a band does to one.

    Walk k N + n is order k and state n. Grid: batch x bands x blocks of channels.
    """
    blocks = tl.cdiv(channels, BLOCK_E)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    image, band = part // bands, (part % bands).to(tl.int32)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    is_channel = (e < channels) | EVEN
    map_at = image * height * width * channels
    x_ptr += map_at
    sum_ptr += map_at
    y_ptr += map_at
    left_ptr += part * tl.maximum(height, width) * channels + e
    carry_ptr += part * edge * channels + e

    for w in range(walk, walk + walks_here):
        k, n = w // states, w % states
        order = (orders >> (2 * k)) & 3
        columns, begin_line, end_line, begin, end = _bounds(order, height, width, band, bands, NDIM)
        start, step_line, step_column = _directions(order, height, width, width * channels, channels, WIDE)
        dt_start, dt_line, dt_place = _directions(order, height, width, dt_row, dt_column, WIDE)
        BC_start, BC_line, BC_place = _directions(order, height, width, BC_row, BC_column, WIDE)
        dt_ = dt_ptr + image * dt_image + k.to(tl.int64) * dt_order
        B_ = B_ptr + image * BC_image + k.to(tl.int64) * BC_order + n
        C_ = C_ptr + image * BC_image + k.to(tl.int64) * BC_order + n

        lanes = k * channels + e
        A = tl.load(A_ptr + lanes * states + n, mask=is_channel, other=0.0) * LOG2E
        bias, D = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + lanes, mask=is_channel, other=0.0)
        if HAS_D:
            D = tl.load(D_ptr + lanes, mask=is_channel & (n == 0), other=0.0)

        carry, product = tl.zeros([BLOCK_E], tl.float32), tl.full([BLOCK_E], 1.0, tl.float32)
        if HAS_CARRY and NDIM == 1:
            carry = tl.load(carry_ptr + half, mask=is_channel, other=0.0)
        for strip in range(begin, end, S * J):
            place = strip + tl.arange(0, S)[:, None] * J + tl.arange(0, J)[None, :]  # [S, J]
            is_place = place < end
            mask = is_place[:, :, None] & is_channel[None, None, :]
            place = tl.minimum(place, end - 1)  # what is read beyond the end is of no account: there are no steps
            edge_ = carry_ptr[None, None, :] + (place * channels)[:, :, None]
            h, products = tl.zeros([S, J, BLOCK_E], tl.float32), tl.full([S, J, BLOCK_E], 1.0, tl.float32)
            if HAS_CARRY and NDIM == 2:
                h = tl.load(edge_ + half, mask=mask, other=0.0)
            for line in range(begin_line, end_line):
                at = _offset(start, step_line, step_column, line, place, columns, NDIM)
                at = at[:, :, None] + e[None, None, :]
                BC_at = _offset(BC_start, BC_line, BC_place, line, place, columns, NDIM)
                dt_at = _offset(dt_start, dt_line, dt_place, line, place, columns, NDIM)
                x = tl.load(x_ptr + at, mask=is_channel[None, None, :], other=0.0).to(tl.float32)
                B = tl.load(B_ + BC_at).to(tl.float32)
                weight_ = weight_ptr + k * rank * channels
                step, _ = _load_steps(
                    x,
                    dt_,
                    dt_at,
                    weight_,
                    bias,
                    e,
                    is_channel,
                    is_place,
                    channels,
                    rank,
                    SOFTPLUS,
                    LOW_RANK,
                    J,
                    S,
                    BLOCK_E,
                )
                a = tl.exp2(step * A[None, None, :])
                if NDIM == 2:
                    left_ = left_ptr + line * channels
                    carry = tl.load(left_, mask=is_channel & (strip > begin), other=0.0)
                g, _, carry, decay = _scan_line(a, step * x * B[:, :, None], carry, J, S, BLOCK_E)
                if NDIM == 2:
                    tl.store(left_, carry, mask=is_channel & (strip + S * J < end))
                    h = a * h + g
                    products *= a
                else:
                    h = g
                    product *= decay
                if not SUMMARY:
                    y = h
                    if HAS_C:
                        C = tl.load(C_ + BC_at).to(tl.float32)
                        y = h * C[:, :, None] + D[None, None, :] * x
                        if w > 0:
                            y += tl.load(sum_ptr + at, mask=mask, other=0.0)
                    if HAS_C and w < walks - 1:
                        tl.store(sum_ptr + at, y, mask=mask)
                    else:
                        tl.store(y_ptr + at, y, mask=mask)
            if NDIM == 2:
                if SUMMARY:
                    tl.store(edge_, products, mask=mask)
                    tl.store(edge_ + half, h, mask=mask)
                tl.debug_barrier()  # what this strip hands on is seen in the next
        if SUMMARY and NDIM == 1:
            tl.store(carry_ptr, product, mask=is_channel)
            tl.store(carry_ptr + half, carry, mask=is_channel)
        tl.debug_barrier()  # what this walk adds is seen in the next


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def _scan_backward(
    grad_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    weight_ptr,
    h_ptr,
    sum_ptr,
    dx_ptr,
    draw_ptr,
    parts_ptr,
    dparams_ptr,
    left_ptr,
    carry_ptr,
    dt_image,
    dt_row,
    dt_column,
    dt_order,
    BC_image,
    BC_row,
    BC_column,
    BC_order,
    height,
    width,
    channels,
    rank,
    states,
    orders,
    walks,
    bands,
    edge,
    half,
    kind,  # of launch, for the autotuner
    walk,
    draw_orders,
    NDIM: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMMARY: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
):
    """Follow one walk backwards, given its states: lines and places count along the opposite order.

    With dh and dg the gradients of h and g, a place hands a dh on to the next line and a dg to the next place.
    Grid: batch x bands x blocks of channels.

    draw_ptr: Gradient of the steps before bias and softplus, (batch, H, W, draw_orders, E); it adds up over states.
    parts_ptr: Gradients of B and C, by blocks of channels, (blocks, batch, H, W, 2).
    dparams_ptr: Gradients of A, dt_bias and D, by images and bands, (batch, bands, walks, 3, E).
    """
    blocks = tl.cdiv(channels, BLOCK_E)
    block = tl.program_id(0) % blocks
    part = (tl.program_id(0) // blocks).to(tl.int64)
    image, band = part // bands, (part % bands).to(tl.int32)
    batch = tl.num_programs(0) // (blocks * bands)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    is_channel = (e < channels) | EVEN
    map_at = image * height * width * channels
    grad_ptr += map_at
    x_ptr += map_at
    h_ptr += map_at
    sum_ptr += map_at
    dx_ptr += map_at
    draw_ptr += map_at * draw_orders
    left_ptr += part * tl.maximum(height, width) * channels + e
    carry_ptr += part * edge * channels + e
    parts_ptr += (block.to(tl.int64) * batch + image) * height * width * 2
    dparams_ptr += (part * walks + walk) * 3 * channels + e

    k, n = walk // states, walk % states
    order = ((orders >> (2 * k)) & 3) ^ 2
    columns, begin_line, end_line, begin, end = _bounds(order, height, width, band, bands, NDIM)
    lines = tl.where(order % 2 == 0, height, width)
    start, step_line, step_column = _directions(order, height, width, width * channels, channels, WIDE)
    dt_start, dt_line, dt_place = _directions(order, height, width, dt_row, dt_column, WIDE)
    BC_start, BC_line, BC_place = _directions(order, height, width, BC_row, BC_column, WIDE)
    dt_ptr += image * dt_image + k.to(tl.int64) * dt_order
    B_ptr += image * BC_image + k.to(tl.int64) * BC_order + n
    C_ptr += image * BC_image + k.to(tl.int64) * BC_order + n
    weight_ptr += k * rank * channels
    draw_ptr += (k % draw_orders) * channels

    lanes = k * channels + e
    A = tl.load(A_ptr + lanes * states + n, mask=is_channel, other=0.0)
    bias, D = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=is_channel, other=0.0)
    if HAS_D:
        D = tl.load(D_ptr + lanes, mask=is_channel & (n == 0), other=0.0)
    dA, dbias = tl.zeros([S, BLOCK_E], tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    dD = tl.zeros([S, BLOCK_E], tl.float32)

    carry, product = tl.zeros([BLOCK_E], tl.float32), tl.full([BLOCK_E], 1.0, tl.float32)
    if HAS_CARRY and NDIM == 1:
        carry = tl.load(carry_ptr + half, mask=is_channel, other=0.0)
    for strip in range(begin, end, S * J):
        place = strip + tl.arange(0, S)[:, None] * J + tl.arange(0, J)[None, :]  # [S, J]
        is_place = place < end
        mask = is_place[:, :, None] & is_channel[None, None, :]
        place = tl.minimum(place, end - 1)
        edge_ = carry_ptr[None, None, :] + (place * channels)[:, :, None]
        flow, products = tl.zeros([S, J, BLOCK_E], tl.float32), tl.full([S, J, BLOCK_E], 1.0, tl.float32)
        if HAS_CARRY and NDIM == 2:
            flow = tl.load(edge_ + half, mask=mask, other=0.0)
        for line in range(begin_line, end_line):
            place_at = _offset(start, step_line, step_column, line, place, columns, NDIM)
            at = place_at[:, :, None] + e[None, None, :]
            BC_at = _offset(BC_start, BC_line, BC_place, line, place, columns, NDIM)
            dt_at = _offset(dt_start, dt_line, dt_place, line, place, columns, NDIM)
            dy = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            step, slope = _load_steps(
                dy,
                dt_ptr,
                dt_at,
                weight_ptr,
                bias,
                e,
                is_channel,
                is_place,
                channels,
                rank,
                SOFTPLUS,
                LOW_RANK,
                J,
                S,
                BLOCK_E,
            )
            a = tl.exp2(step * (A * LOG2E)[None, None, :])
            dh = dy
            if HAS_C:
                dh = dy * tl.load(C_ptr + BC_at).to(tl.float32)[:, :, None]
            if NDIM == 2:
                dh += flow
                flow = a * dh
                products *= a
            if NDIM == 1 or not SUMMARY:
                left_ = left_ptr + line * channels
                if NDIM == 2:
                    carry = tl.load(left_, mask=is_channel & (strip > begin), other=0.0)
                _, dg, carry, decay = _scan_line(a, a * dh, carry, J, S, BLOCK_E)
                dg += dh
                product *= decay
                if NDIM == 2:
                    tl.store(left_, carry, mask=is_channel & (strip + S * J < end))
            if not SUMMARY:
                x = tl.load(x_ptr + at, mask=is_channel[None, None, :], other=0.0).to(tl.float32)
                B = tl.load(B_ptr + BC_at).to(tl.float32)[:, :, None]
                h = tl.load(h_ptr + at, mask=mask, other=0.0)
                if NDIM == 2:  # a da = dh (a times h of the line before) + dg (a times g of the place before)
                    before = a * tl.load(h_ptr + at + step_line, mask=mask & (line + 1 < lines), other=0.0)
                    da = dh * before + dg * (h - before - step * x * B)
                else:
                    da = dg * (h - step * x * B)
                dx = dg * step * B + D[None, None, :] * dy
                if walk > 0:
                    dx += tl.load(sum_ptr + at, mask=mask, other=0.0)
                if walk < walks - 1:
                    tl.store(sum_ptr + at, dx, mask=mask)
                else:
                    tl.store(dx_ptr + at, dx, mask=mask)
                draw = (da * A[None, None, :] + dg * B * x) * slope
                draw = tl.where(mask, draw, 0.0)
                dA += tl.sum(da * step, 1)
                dbias += tl.sum(draw, 1)
                dD += tl.sum(dy * x, 1)
                draw_ = draw_ptr + (place_at.to(tl.int64) * draw_orders)[:, :, None] + e[None, None, :]
                if n > 0:
                    draw += tl.load(draw_, mask=mask, other=0.0)
                tl.store(draw_, draw, mask=mask)
                part_ = parts_ptr + place_at // channels * 2
                tl.store(part_, tl.sum(dg * step * x, 2), mask=is_place)
                if HAS_C:
                    tl.store(part_ + 1, tl.sum(dy * h, 2), mask=is_place)
        if NDIM == 2:
            if SUMMARY:
                tl.store(edge_, products, mask=mask)
                tl.store(edge_ + half, flow, mask=mask)
            tl.debug_barrier()  # what this strip hands on is seen in the next

    if SUMMARY:
        if NDIM == 1:
            tl.store(carry_ptr, product, mask=is_channel)
            tl.store(carry_ptr + half, carry, mask=is_channel)
    else:
        tl.store(dparams_ptr, tl.sum(dA, 0), mask=is_channel)
        tl.store(dparams_ptr + channels, tl.sum(dbias, 0), mask=is_channel)
        tl.store(dparams_ptr + 2 * channels, tl.sum(dD, 0), mask=is_channel)


# ---- launches --------------------------------------------------------------------------------------------------------

WIDE_FROM = 1 << 31  # elements of a map that need offsets of 64 bits
BLOCK_E = 32  # a warp's lanes: with more channels a thread runs out of registers

# Tiles (J, S) for lines of up to so many places, the default first: it leaves every kernel without spills.
TILES = {
    16: ((4, 4), (2, 8), (8, 2)),
    1 << 62: ((4, 8), (4, 16), (8, 8)),
}


def _resources(S: int) -> dict[str, int]:
    """Of a program: its warps, and as many registers as it can have; left to itself the compiler spills for occupancy.

    Nothing is read ahead of time (num_stages), for a walk reads what it has written.
    """
    return dict(num_warps=S, num_stages=1, maxnreg=min(255, 2048 // S))


_chosen: dict[tuple, tuple[int, int]] = {}  # the tile of every kind of launch that was tuned


@functools.cache
def _autotuned(kernel: triton.JITFunction, tiles: tuple[tuple[int, int], ...]) -> Any:
    """The kernel with the fastest of some tiles, kept on disk. A trial writes no more than the launch that follows it:
    the first one of a call adds to nothing.
    """
    configs = [triton.Config(dict(J=J, S=S), **_resources(S)) for J, S in tiles]
    key = ['NDIM', 'LOW_RANK', 'HAS_C', 'SUMMARY', 'HAS_CARRY', 'kind']
    return triton.autotune(configs, key, cache_results=True)(kernel)


def kind_of(programs: int, processors: int, line: int, rank: int) -> int:
    """For what a tile is tuned, beside types and options: how full the device is, how long lines are, and the rank.

    Each in a few classes, so that another image size seldom tunes anything anew.
    """
    load = sum(programs >= limit * processors for limit in (1, 4))
    length = sum(line > limit for limit in (16, 64))
    depth = sum(rank > limit for limit in (0, 8, 32))
    return load + 3 * length + 9 * depth


def processors(device: torch.device) -> int:
    """How many programs a device runs side by side, at least; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def choose_bands(programs: int, height: int, width: int, ndim: int, wanted: int) -> int:
    """Into how many bands the walks are cut, so that there are at least `wanted` programs, and many more if any."""
    if programs >= wanted:
        return 1
    most = max(height, width) // 8 if ndim == 2 else height * width // 256
    return max(1, min(4 * wanted // programs, most))


class _Scan:
    """A call of the op: its arguments as the kernels take them, and their launches. What is absent is x, never read."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor | None,
        D: Tensor | None,
        dt_bias: Tensor | None,
        dt_weight: Tensor | None,
        ndim: int,
        orders: Sequence[int],
        softplus: bool,
    ) -> None:
        self.x = x = x.contiguous()
        self.shape = batch, height, width, channels = x.shape
        self.K, _, self.N = A.shape
        self.walks = self.K * self.N
        self.rank = 0 if dt_weight is None else dt_weight.shape[2]
        self.has_C = C is not None
        self.dt = dt if dt.stride(-1) == 1 or dt.shape[-1] == 1 else dt.contiguous()
        C = B if C is None else C
        if B.stride() != C.stride() or (B.stride(-1) != 1 and self.N > 1):
            B, C = B.contiguous(), C.contiguous()
        self.B, self.C = B, C
        D, dt_bias, dt_weight = (
            None if t is None else t.to(torch.float32).contiguous() for t in (D, dt_bias, dt_weight)
        )
        self.dt_weight = dt_weight  # (K, E, R)
        weight = None if dt_weight is None else dt_weight.transpose(1, 2).contiguous()
        self.A = A.to(torch.float32).contiguous()
        self.parameters = [x if t is None else t for t in (D, dt_bias, weight)]

        self.blocks = triton.cdiv(channels, BLOCK_E)
        self.bands = choose_bands(batch * self.blocks, height, width, ndim, processors(x.device))
        self.grid = (batch * self.bands * self.blocks,)
        self.edge = max(height, width) if ndim == 2 else 1  # columns that hand a state on to the next band
        self.left = self.buffer(batch * self.bands, self.edge, channels)
        self.carry = self.buffer(2, batch * self.bands, self.edge, channels) if self.bands > 1 else self.left
        line = max(height, width) if ndim == 2 else height * width
        kind = kind_of(batch * self.blocks, processors(x.device), line, self.rank)
        self.tiles = next(tiles for length, tiles in TILES.items() if line <= length)
        reach = max((t.shape[1] - 1) * t.stride(1) + (t.shape[2] - 1) * t.stride(2) for t in (x, self.dt, B))
        self.sizes = dict(
            dt_image=self.dt.stride(0),
            dt_row=self.dt.stride(1),
            dt_column=self.dt.stride(2),
            dt_order=self.dt.stride(3),
            BC_image=B.stride(0),
            BC_row=B.stride(1),
            BC_column=B.stride(2),
            BC_order=B.stride(3),
            height=height,
            width=width,
            channels=channels,
            rank=self.rank,
            states=self.N,
            orders=sum(order << 2 * k for k, order in enumerate(orders)),
            walks=self.walks,
            bands=self.bands,
            edge=self.edge,
            half=batch * self.bands * self.edge * channels,
            kind=kind,
        )
        self.options = dict(
            NDIM=ndim,
            SOFTPLUS=softplus,
            LOW_RANK=dt_weight is not None,
            HAS_BIAS=dt_bias is not None,
            HAS_D=D is not None,
            WIDE=reach + channels >= WIDE_FROM,
            EVEN=channels % BLOCK_E == 0,
            BLOCK_E=BLOCK_E,
        )

    def buffer(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch(self, kernel: triton.JITFunction, *tensors: Tensor, **options: Any) -> None:
        """Over the whole grid; where the walk is cut into bands, with the states that enter them."""

        def once(summary: bool, has_carry: bool) -> None:
            arguments = (*tensors, self.left, self.carry)
            keywords = dict(self.sizes, **self.options, **options, SUMMARY=summary, HAS_CARRY=has_carry)
            tile = self.tiles[0]
            if self.x.is_cuda and not torch.are_deterministic_algorithms_enabled():
                flags = (value for name, value in keywords.items() if name.isupper())
                key = (kernel, self.x.device, self.sizes['kind'], *flags, *(t.dtype for t in tensors))
                if key not in _chosen and not torch.cuda.is_current_stream_capturing():
                    tuner = _autotuned(kernel, self.tiles)
                    tuner[self.grid](*arguments, **keywords)
                    _chosen[key] = tuner.best_config.kwargs['J'], tuner.best_config.kwargs['S']
                    return
                tile = _chosen.get(key, tile)
            J, S = tile
            kernel[self.grid](*arguments, **keywords, J=J, S=S, **_resources(S))

        if self.bands == 1:
            return once(False, False)
        once(True, False)
        size = self.edge * self.shape[3]
        grid = (triton.cdiv(size, 128), self.shape[0])
        _stitch[grid](self.carry, self.sizes['half'], self.bands, size, BLOCK=128, num_warps=4)
        once(False, True)

    def forward(self, walk: int, walks: int, has_C: bool, sums: Tensor, y: Tensor) -> None:
        D, bias, weight = self.parameters
        tensors = (self.x, self.dt, self.A, self.B, self.C, D, bias, weight, sums, y)
        self.launch(_scan_forward, *tensors, walk=walk, walks_here=walks, HAS_C=has_C)

    def backward(
        self, walk: int, grad_y: Tensor, h: Tensor, sums: Tensor, dx: Tensor, draw: Tensor, *parts: Tensor
    ) -> None:
        D, bias, weight = self.parameters
        tensors = (grad_y, self.x, self.dt, self.A, self.B, self.C, D, bias, weight, h, sums, dx, draw, *parts)
        self.launch(_scan_backward, *tensors, walk=walk, draw_orders=draw.shape[3], HAS_C=self.has_C)


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    ndim: int,
    orders: Sequence[int],
    softplus: bool,
) -> Tensor:
    """The operator `vssm::selective_scan` on CUDA, same arguments, but for float64, which is the reference's."""
    check_precision('selective_scan', x)
    with torch.cuda.device_of(x):
        scan = _Scan(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = y if x.dtype == torch.float32 or scan.walks == 1 else scan.buffer(*x.shape)
        step = scan.walks if scan.bands == 1 else 1
        for walk in range(0, scan.walks, step):
            scan.forward(walk, step, scan.has_C, sums, y)
    return y


def selective_scan_triton_backward(
    grad_y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    ndim: int,
    orders: Sequence[int],
    softplus: bool,
) -> tuple[Tensor, ...]:
    """The operator `vssm::selective_scan_backward` on CUDA, same arguments, but for float64."""
    check_precision('selective_scan', x)
    inputs = (x, dt, A, B, C, D, dt_bias, dt_weight)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):  # of which products would take notice
        scan = _Scan(*inputs, ndim, orders, softplus)
        batch, height, width, channels = scan.shape
        K, N, rank, weight, cells = scan.K, scan.N, scan.rank, scan.dt_weight, (batch, height, width)
        grad_y = grad_y.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = dx if x.dtype == torch.float32 or scan.walks == 1 else scan.buffer(*x.shape)
        draw = scan.buffer(*cells, 1 if rank else K, channels)
        ddt, dweight = (scan.buffer(*cells, K, rank), scan.buffer(K, channels, rank)) if rank else (draw, None)
        dB, dC = scan.buffer(*cells, K, N), scan.buffer(*cells, K, N)
        dparams = scan.buffer(batch * scan.bands, K, N, 3, channels)
        h, by_block = scan.buffer(*x.shape), scan.buffer(scan.blocks, *cells, 2)
        for walk in range(scan.walks):
            k, n = walk // N, walk % N
            scan.forward(walk, 1, False, h, h)
            scan.backward(walk, grad_y, h, sums, dx, draw, by_block, dparams)
            dB[..., k, n], dC[..., k, n] = by_block.sum(0).unbind(-1)
            if rank and n == N - 1:
                low = scan.dt[..., k, :].to(torch.float32).flatten(0, 2)  # [B H W, R]
                flat = draw.flatten(0, 3)  # [B H W, E]
                ddt[..., k, :] = (flat @ weight[k]).unflatten(0, cells)
                dweight[k] = flat.T @ low
        dA, dbias, dD = dparams.sum(0).unbind(2)  # [K, N, E] each
        dA, dD = dA.transpose(1, 2).clone(memory_format=torch.contiguous_format), dD[:, 0].clone()
        grads = (dx, ddt, dA, dB, dC, dD, dbias.sum(1), dweight)
        return tuple(
            grad_y.new_empty(0) if t is None else grad.to(t.dtype) for t, grad in zip(inputs, grads, strict=True)
        )
