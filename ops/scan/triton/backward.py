# SPDX-License-Identifier: Apache-2.0
"""The backward pass of one walk; it also finds the summary of a band."""

import triton
import triton.language as tl

from .recurrence import _scan_line
from .steps import LOG2E, _load_steps
from .walk import _INTEGERS, _bounds, _directions, _offset


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
    kind,  # of launch, by which the autotuner keeps its choices
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
