# SPDX-License-Identifier: Apache-2.0
"""The forward pass of 2-D scans; it also finds the summary of a band, and what the backward pass reads."""

import triton
import triton.language as tl

from .recurrence import _chain, _chain_and_before, _last_place, _next_warp
from .steps import LOG2E, _load_raw, _steps
from .walk import _INTEGERS, _POINTERS, BLOCK_E, _band, _directions, _edges, _load_BC, _parameters, _program


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _scan_forward_2d(
    x_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    parameters_ptr,
    sum_ptr,
    y_ptr,
    edges_ptr,
    dt_row,
    BC_row,
    height,
    width,
    channels,
    rank,
    states,
    orders,
    walks,
    kind,  # of launch, by which the autotuner keeps its choices
    walk,
    walks_here,
    PAIR: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_C: tl.constexpr,
    SUMMARY: tl.constexpr,
    TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
):
    """Add `walks_here` walks from `walk` on to y, or without C write states; with SUMMARY find what a band does to one.

    Walk k N + n is order k and state n. With PAIR it is the orders 2 k and 2 k + 1, which begin in one corner: the
    second goes along the columns, and so scans along the places what the first scans along the lines.
    With TERMS write a times the state of the line before to y, and a times the g of the place before to sums.
    """
    ORDERS: tl.constexpr = 2 if PAIR else 1
    HALVES: tl.constexpr = dt_ptr.dtype.element_ty == tl.bfloat16
    image, images, e, is_channel = _program(channels, WIDE, EVEN)
    K = walks * ORDERS // states  # number of orders
    edges, other = _edges(image, images, tl.maximum(height, width) * channels, e)
    products_ptr, states_ptr = edges_ptr + ORDERS * other, edges_ptr + 2 * ORDERS * other
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)

    for w in range(walk, walk + walks_here):
        k, n = w // states * ORDERS, w % states
        lines, columns, start, step_line, step_place = _directions((orders >> (2 * k)) & 3, image, height, width)
        begin, end = _band(lines)
        A, D, bias, weight = _parameters(parameters_ptr, k, n, e, is_channel, channels, rank, states, RANK, HALVES)
        if PAIR:
            A2, D2, bias2, weight2 = _parameters(
                parameters_ptr, k + 1, n, e, is_channel, channels, rank, states, RANK, HALVES
            )
            D += D2

        for strip in range(0, columns, S * J):
            column, column_ = strip + s * J + j, strip + p  # [S, J], [S J]
            is_column = j < columns - strip - s * J  # [S, J]
            is_edge = is_column[:, :, None] & is_channel[None, None, :]
            edge = (column * channels)[:, :, None] + edges[None, None, :]
            # Where the tile lies, which goes on by a line at a time.
            at = (start + (begin - s) * step_line + column * step_place)[:, :, None] * channels + e[None, None, :]
            zero = tl.zeros([S, J, BLOCK_E], tl.float32)
            down, product = zero, zero + 1.0  # the states of the line above, and the product of all a of a column
            down2, product2 = zero, zero + 1.0
            if not SUMMARY:
                is_entered = is_edge & (begin > 0)
                down = tl.load(states_ptr + edge, is_entered, 0.0)
                if PAIR:
                    down2 = tl.load(states_ptr + other + edge, is_entered, 0.0)
            last, last2 = tl.zeros([S, ORDERS * BLOCK_E], tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
            # Every warp is a line behind its left neighbour, and takes from it what enters that line.
            for time in range(begin, end + S - 1):
                line, line_ = time - s, time - p // J  # [S, 1], [S J]
                is_line = (line >= begin) & (line < end)
                is_place_ = (line_ >= begin) & (line_ < end) & (column_ < columns)
                row = (start + line_ * step_line + column_ * step_place) * K + k
                raw = _load_raw(dt_ptr, row * dt_row, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J)
                if PAIR:
                    raw2 = _load_raw(
                        dt_ptr, row * dt_row + dt_row, weight2, is_place_, e, is_channel, rank, RANK, HALVES, S, J
                    )
                B, C = _load_BC(B_ptr + n, C_ptr + n, row * BC_row, BC_row, is_place_, ORDERS, S, J)
                mask = (is_line & is_column)[:, :, None] & is_channel[None, None, :]
                x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
                left_ = edges_ptr + (line * channels + edges[None, :])  # [S, E]
                is_left = is_line & (s == 0) & (strip > 0) & is_channel[None, :]
                is_right = is_line & (s == S - 1) & (strip + S * J < columns) & is_channel[None, :]
                step, slope = _steps(raw, bias, is_line, x, SOFTPLUS)
                entering = tl.load(left_, is_left, 0.0)
                if PAIR:
                    step2, slope2 = _steps(raw2, bias2, is_line, x, SOFTPLUS)
                    B, B2 = tl.split(B)
                    C, C2 = tl.split(C)
                    entering = tl.join(entering, tl.load(left_ + other, is_left, 0.0))
                    entering = _next_warp(tl.reshape(entering, (S, 2 * BLOCK_E)), last, S, 2 * BLOCK_E)
                    entering, entering2 = tl.split(tl.reshape(entering, (S, BLOCK_E, 2)))
                else:
                    B, C = tl.reshape(B, (S, J)), tl.reshape(C, (S, J))
                    entering = _next_warp(entering, last, S, BLOCK_E)

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
                if SUMMARY:
                    product *= a
                if PAIR:
                    a = tl.exp2(step2 * (A2 * LOG2E)[None, None, :])
                    down2 = a * down2 + step2 * x * B2[:, :, None]
                    if SUMMARY:
                        product2 *= a
                    else:
                        along = _chain(a, down2, entering2, J)
                        last2 = _last_place(along, J)
                        tl.store(left_ + other, last2, is_right)
                    last = tl.reshape(tl.join(last, last2), (S, 2 * BLOCK_E))
                if not SUMMARY and not TERMS:
                    y = down
                    if HAS_C:
                        y = down * C[:, :, None] + D[None, None, :] * x
                    if PAIR:
                        y += along * C2[:, :, None]
                    if HAS_C and w > 0:
                        y += tl.load(sum_ptr + at, mask, 0.0)
                    if HAS_C and w < walks - 1:
                        tl.store(sum_ptr + at, y, mask)
                    else:
                        tl.store(y_ptr + at, y, mask)
                at += step_line * channels
            if SUMMARY:
                tl.store(products_ptr + edge, product, is_edge)
                tl.store(states_ptr + edge, down, is_edge)
                if PAIR:
                    tl.store(products_ptr + other + edge, product2, is_edge)
                    tl.store(states_ptr + other + edge, down2, is_edge)
            tl.debug_barrier()  # what this strip hands on is seen in the next
        tl.debug_barrier()  # what this walk adds is seen in the next
