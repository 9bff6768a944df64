# SPDX-License-Identifier: Apache-2.0
"""The forward pass; it also finds the summary of a band, and writes the states that the backward pass reads."""

import triton
import triton.language as tl

from .recurrence import _scan_line
from .steps import LOG2E, _load_steps
from .walk import _INTEGERS, _bounds, _directions, _offset


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
    kind,  # of launch, by which the autotuner keeps its choices
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
