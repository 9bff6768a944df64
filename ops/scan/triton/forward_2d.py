# SPDX-License-Identifier: Apache-2.0
"""The forward pass of 2-D scans; it also finds the summary of a band, and what the backward pass reads."""

import triton
import triton.language as tl

from .recurrence import _chain, _chain_and_before, _last_place, _next_warp
from .steps import LOG2E, _load_raw, _steps
from .walk import _INTEGERS, _POINTERS, _bounds, _choose, _directions, _parameters


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _scan_forward_2d(
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
    PAIR: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALVES: tl.constexpr,
    SUMMARY: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
):
    """Add `walks_here` walks from `walk` on to y, or without C write states; with SUMMARY find what a band does to one.

    Walk k N + n is order k and state n. With PAIR it is the orders 2 k and 2 k + 1, which begin in one corner: the
    second goes along the columns, and so scans along the places what the first scans along the lines.
    With TERMS write a times the state of the line before to y, and a times the g of the place before to sums.
    Grid: batch x bands x blocks of channels.
    """
    blocks = tl.cdiv(channels, BLOCK_E)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    image, band = part // bands, (part % bands).to(tl.int32)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    is_channel = (e < channels) | EVEN
    ORDERS: tl.constexpr = 2 if PAIR else 1
    map_at = image * height * width * channels
    x_ptr += map_at
    sum_ptr += map_at
    y_ptr += map_at
    left_ptr += part * ORDERS * edge * channels + e
    carry_ptr += part * edge * channels + e
    other = half // 2  # from the edges of a pair's first order to those of its second
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)
    second, is_C = tl.arange(0, ORDERS)[None, :, None], tl.arange(0, 2)[None, None, :] == 1

    for w in range(walk, walk + walks_here):
        k, n = w // states * ORDERS, w % states
        order = (orders >> (2 * k)) & 3
        columns, begin, end, begin_place, end_place = _bounds(order, height, width, band, bands, 2)
        start, step_line, step_place = _directions(order, height, width, width * channels, channels, WIDE)
        dt_start, dt_line, dt_place = _directions(order, height, width, dt_row, dt_column, WIDE)
        BC_start, BC_line, BC_place = _directions(order, height, width, BC_row, BC_column, WIDE)
        dt_ = dt_ptr + image * dt_image + k.to(tl.int64) * dt_order + dt_start
        BC_ = _choose(is_C, C_ptr, B_ptr) + image * BC_image + k.to(tl.int64) * BC_order + BC_start + n
        BC_ += second * BC_order
        A, D, bias, weight = _parameters(
            A_ptr, D_ptr, bias_ptr, weight_ptr, k, n, e, is_channel, channels, rank, states,
            HAS_D, HAS_BIAS, RANK, HALVES,
        )  # fmt: skip
        if PAIR:
            A2, D2, bias2, weight2 = _parameters(
                A_ptr, D_ptr, bias_ptr, weight_ptr, k + 1, n, e, is_channel, channels, rank, states,
                HAS_D, HAS_BIAS, RANK, HALVES,
            )  # fmt: skip
            D += D2

        for strip in range(0, columns, S * J):
            is_column, is_column_ = strip + s * J + j < columns, strip + p < columns  # [S, J], [S J]
            is_edge = is_column[:, :, None] & is_channel[None, None, :]
            edge_ = carry_ptr[None, None, :] + ((strip + s * J + j) * channels)[:, :, None]
            zero = tl.zeros([S, J, BLOCK_E], tl.float32)
            down, product = zero, zero + 1.0  # the states of the line above, and the product of all a of a column
            down2, product2 = zero, zero + 1.0
            if HAS_CARRY:
                down = tl.load(edge_ + half, is_edge, 0.0)
                if PAIR:
                    down2 = tl.load(edge_ + half + other, is_edge, 0.0)
            last, last2 = tl.zeros([S, ORDERS * BLOCK_E], tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
            # Every warp is a line behind its left neighbour, and takes from it what enters that line.
            for time in range(begin, end + S - 1):
                line, line_ = time - s, time - p // J  # [S, 1], [S J]
                is_line = (line >= begin) & (line < end)
                is_place_ = (line_ >= begin) & (line_ < end) & is_column_
                dt_at = line_ * dt_line + (strip + p) * dt_place
                raw = _load_raw(dt_, dt_at, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J, BLOCK_E)
                if PAIR:
                    raw2 = _load_raw(
                        dt_ + dt_order, dt_at, weight2, is_place_, e, is_channel, rank, RANK, HALVES, S, J, BLOCK_E
                    )
                BC_at = line_ * BC_line + (strip + p) * BC_place
                BC = tl.load(BC_ + BC_at[:, None, None], is_place_[:, None, None], 0.0).to(tl.float32)
                B, C = tl.split(tl.reshape(BC, (S, J, ORDERS, 2)))
                at = start + line * step_line + (strip + s * J + j) * step_place
                at = at[:, :, None] + e[None, None, :]
                mask = (is_line & is_column)[:, :, None] & is_channel[None, None, :]
                x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
                left_ = left_ptr[None, :] + line * channels  # [S, E]
                is_left = is_line & (s == 0) & (strip > 0) & is_channel[None, :]
                is_right = is_line & (s == S - 1) & (strip + S * J < columns) & is_channel[None, :]
                step, slope = _steps(raw, bias, x, SOFTPLUS)
                entering = tl.load(left_, is_left, 0.0)
                if PAIR:
                    step2, slope2 = _steps(raw2, bias2, x, SOFTPLUS)
                    B, B2 = tl.split(B)
                    C, C2 = tl.split(C)
                    entering = tl.join(entering, tl.load(left_ + edge * channels, is_left, 0.0))
                    entering = _next_warp(tl.reshape(entering, (S, 2 * BLOCK_E)), last, S, 2 * BLOCK_E)
                    entering, entering2 = tl.split(tl.reshape(entering, (S, BLOCK_E, 2)))
                else:
                    B, C = tl.reshape(B, (S, J)), tl.reshape(C, (S, J))
                    entering = _next_warp(entering, last, S, BLOCK_E)
                if S > 1:  # a line that is not there passes the states on
                    step = tl.where(is_line[:, :, None], step, 0.0)
                    if PAIR:
                        step2 = tl.where(is_line[:, :, None], step2, 0.0)

                a = tl.exp2(step * (A * LOG2E)[None, None, :])
                b = step * x * B[:, :, None]
                if TERMS:
                    g, before = _chain_and_before(a, b, entering, J)
                    tl.store(y_ptr + at, a * down, mask)
                    tl.store(sum_ptr + at, a * before, mask)
                else:
                    g = _chain(a, b, entering, J)
                down = a * down + g
                last = _last_place(g, J)
                tl.store(left_, last, is_right)
                y = down
                if HAS_C:
                    y = down * C[:, :, None] + D[None, None, :] * x
                if SUMMARY:
                    product *= a
                if PAIR:
                    a = tl.exp2(step2 * (A2 * LOG2E)[None, None, :])
                    down2 = a * down2 + step2 * x * B2[:, :, None]
                    if SUMMARY:
                        product2 *= a
                    else:
                        h = _chain(a, down2, entering2, J)
                        last2 = _last_place(h, J)
                        tl.store(left_ + edge * channels, last2, is_right)
                        y += h * C2[:, :, None]
                    last = tl.reshape(tl.join(last, last2), (S, 2 * BLOCK_E))
                if not SUMMARY and not TERMS:
                    if HAS_C and w > 0:
                        y += tl.load(sum_ptr + at, mask, 0.0)
                    if HAS_C and w < walks - 1:
                        tl.store(sum_ptr + at, y, mask)
                    else:
                        tl.store(y_ptr + at, y, mask)
            if SUMMARY:
                tl.store(edge_, product, is_edge)
                tl.store(edge_ + half, down, is_edge)
                if PAIR:
                    tl.store(edge_ + other, product2, is_edge)
                    tl.store(edge_ + half + other, down2, is_edge)
            tl.debug_barrier()  # what this strip hands on is seen in the next
        tl.debug_barrier()  # what this walk adds is seen in the next
