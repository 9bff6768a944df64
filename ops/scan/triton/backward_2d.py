# SPDX-License-Identifier: Apache-2.0
"""The backward pass of one walk of a 2-D scan; it also finds the summary of a band."""

import triton
import triton.language as tl

from .recurrence import _chain_and_before, _last_place, _next_warp, _sum_channels
from .steps import LOG2E, _load_raw, _steps
from .walk import _INTEGERS, _POINTERS, _bounds, _choose, _directions, _parameters


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _scan_backward_2d(
    grad_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    weight_ptr,
    from_line_ptr,
    from_place_ptr,
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
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALVES: tl.constexpr,
    SUMMARY: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
):
    """Follow one walk backwards: lines and places count along the opposite order.

    With dh and dg the gradients of h and g, a place hands a dh on to the next line and a dg to the next place.
    Grid: batch x bands x blocks of channels.

    from_line_ptr: a times the state of the line before, what the forward pass writes with TERMS, (batch, H, W, E).
    from_place_ptr: a times the g of the place before, likewise.
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
    from_line_ptr += map_at
    from_place_ptr += map_at
    sum_ptr += map_at
    dx_ptr += map_at
    draw_ptr += map_at * draw_orders
    left_ptr += part * edge * channels + e
    carry_ptr += part * edge * channels + e
    parts_ptr += (block.to(tl.int64) * batch + image) * height * width * 2
    dparams_ptr += (part * walks + walk) * 3 * channels + e
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)
    column = tl.arange(0, 16)[None, :]  # of the gradients of B and C

    k, n = walk // states, walk % states
    order = ((orders >> (2 * k)) & 3) ^ 2
    columns, begin, end, begin_place, end_place = _bounds(order, height, width, band, bands, 2)
    start, step_line, step_place = _directions(order, height, width, width, 1, WIDE)  # in places
    dt_start, dt_line, dt_place = _directions(order, height, width, dt_row, dt_column, WIDE)
    BC_start, BC_line, BC_place = _directions(order, height, width, BC_row, BC_column, WIDE)
    dt_ptr += image * dt_image + k.to(tl.int64) * dt_order + dt_start
    is_C = tl.arange(0, 2)[None, :] == 1
    BC_ = _choose(is_C, C_ptr, B_ptr) + image * BC_image + k.to(tl.int64) * BC_order + BC_start + n
    draw_ptr += (k % draw_orders) * channels
    A, D, bias, weight = _parameters(
        A_ptr, D_ptr, bias_ptr, weight_ptr, k, n, e, is_channel, channels, rank, states, HAS_D, HAS_BIAS, RANK, HALVES
    )
    dA, dbias = tl.zeros([S, BLOCK_E], tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    dD = tl.zeros([S, BLOCK_E], tl.float32)

    for strip in range(0, columns, S * J):
        is_column, is_column_ = strip + s * J + j < columns, strip + p < columns  # [S, J], [S J]
        is_edge = is_column[:, :, None] & is_channel[None, None, :]
        edge_ = carry_ptr[None, None, :] + ((strip + s * J + j) * channels)[:, :, None]
        down = tl.zeros([S, J, BLOCK_E], tl.float32)
        product = down + 1.0
        if HAS_CARRY:
            down = tl.load(edge_ + half, is_edge, 0.0)
        last = tl.zeros([S, BLOCK_E], tl.float32)
        # Every warp is a line behind its left neighbour, and takes from it what enters that line.
        for time in range(begin, end + S - 1):
            line, line_ = time - s, time - p // J  # [S, 1], [S J]
            is_line = (line >= begin) & (line < end)
            is_place_ = (line_ >= begin) & (line_ < end) & is_column_
            dt_at = line_ * dt_line + (strip + p) * dt_place
            raw = _load_raw(dt_ptr, dt_at, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J, BLOCK_E)
            BC_at = line_ * BC_line + (strip + p) * BC_place
            BC = tl.load(BC_ + BC_at[:, None], is_place_[:, None], 0.0).to(tl.float32)
            B, C = tl.split(tl.reshape(BC, (S, J, 2)))
            place_at = start + line * step_line + (strip + s * J + j) * step_place
            at = (place_at * channels)[:, :, None] + e[None, None, :]
            mask = (is_line & is_column)[:, :, None] & is_channel[None, None, :]
            dy = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
            step, slope = _steps(raw, bias, dy, SOFTPLUS)
            if S > 1:  # a line that is not there passes the gradients on
                step = tl.where(is_line[:, :, None], step, 0.0)
            a = tl.exp2(step * (A * LOG2E)[None, None, :])
            dh = down
            if HAS_C:
                dh += dy * C[:, :, None]
            else:
                dh += dy
            down = a * dh
            if SUMMARY:
                product *= a
            else:
                left_ = left_ptr[None, :] + line * channels  # [S, E]
                entering = tl.load(left_, is_line & (s == 0) & (strip > 0) & is_channel[None, :], 0.0)
                entering = _next_warp(entering, last, S, BLOCK_E)
                right, dg = _chain_and_before(a, down, entering, J)
                dg += dh
                last = _last_place(right, J)
                tl.store(left_, last, is_line & (s == S - 1) & (strip + S * J < columns) & is_channel[None, :])

                x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
                from_line = tl.load(from_line_ptr + at, mask, 0.0)
                from_place = tl.load(from_place_ptr + at, mask, 0.0)
                ada = dh * from_line + dg * from_place  # a times the gradient of a
                dx = dg * step * B[:, :, None] + D[None, None, :] * dy
                if walk > 0:
                    dx += tl.load(sum_ptr + at, mask, 0.0)
                if walk < walks - 1:
                    tl.store(sum_ptr + at, dx, mask)
                else:
                    tl.store(dx_ptr + at, dx, mask)
                draw = (ada * A[None, None, :] + dg * B[:, :, None] * x) * slope
                dA += tl.sum(ada * step, 1)
                dbias += tl.sum(draw, 1)
                dD += tl.sum(dy * x, 1)
                draw_ = draw_ptr + (place_at.to(tl.int64) * draw_orders * channels)[:, :, None] + e[None, None, :]
                if n > 0:
                    draw += tl.load(draw_, mask, 0.0)
                tl.store(draw_, draw, mask)
                h = from_line + from_place + step * x * B[:, :, None]
                dBC = _sum_channels(dg * step * x, dy * h, HALVES, S, J, BLOCK_E)
                parts_ = parts_ptr + (start + line_ * step_line + (strip + p) * step_place)[:, None] * 2
                tl.store(parts_ + column, dBC, is_place_[:, None] & (column < 2))
        if SUMMARY:
            tl.store(edge_, product, is_edge)
            tl.store(edge_ + half, down, is_edge)
        tl.debug_barrier()  # what this strip hands on is seen in the next

    if not SUMMARY:
        tl.store(dparams_ptr, tl.sum(dA, 0), mask=is_channel)
        tl.store(dparams_ptr + channels, tl.sum(dbias, 0), mask=is_channel)
        tl.store(dparams_ptr + 2 * channels, tl.sum(dD, 0), mask=is_channel)
