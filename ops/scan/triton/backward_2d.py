# SPDX-License-Identifier: Apache-2.0
"""The backward pass of one walk of a 2-D scan; it also finds the summary of a band."""

import triton
import triton.language as tl

from .recurrence import _chain_and_before, _last_place, _next_warp, _sum_channels
from .steps import LOG2E, _load_raw, _steps
from .walk import _INTEGERS, _POINTERS, BLOCK_E, _band, _directions, _edges, _load_BC, _parameters, _program


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _scan_backward_2d(
    grad_ptr,
    x_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    parameters_ptr,
    from_line_ptr,
    from_place_ptr,
    sum_ptr,
    dx_ptr,
    draw_ptr,
    parts_ptr,
    dparams_ptr,
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
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_C: tl.constexpr,
    SUMMARY: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
):
    """Follow one walk backwards: lines and places count along the opposite order.

    With dh and dg the gradients of h and g, a place hands a dh on to the next line and a dg to the next place.

    from_line_ptr: a times the state of the line before, what the forward pass writes with TERMS, (batch, H, W, E).
    from_place_ptr: a times the g of the place before, likewise.
    draw_ptr: Gradient of the steps before bias and softplus, which adds up over states, (batch, H, W, K, E); of
        low-rank ones that of this order alone, (batch, H, W, E).
    parts_ptr: Gradients of B and C, by blocks of channels, (blocks, batch, H, W, 2).
    dparams_ptr: Gradients of A, dt_bias and D, by images and bands, (batch, bands, walks, 3, E).
    """
    HALVES: tl.constexpr = dt_ptr.dtype.element_ty == tl.bfloat16
    image, images, e, is_channel = _program(channels, WIDE, EVEN)
    K = walks // states  # number of orders
    edges, other = _edges(image, images, tl.maximum(height, width) * channels, e)
    products_ptr, states_ptr = edges_ptr + other, edges_ptr + 2 * other
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)
    c = tl.arange(0, 16)[None, :]  # B and C, and as many as a product has columns
    part = images * (tl.program_id(0) % tl.cdiv(channels, BLOCK_E)) * height * width  # of this block of channels

    k, n = walk // states, walk % states
    lines, columns, start, step_line, step_place = _directions(((orders >> (2 * k)) & 3) ^ 2, image, height, width)
    begin, end = _band(lines)
    A, D, bias, weight = _parameters(parameters_ptr, k, n, e, is_channel, channels, rank, states, RANK, HALVES)
    dA, dbias = tl.zeros([S, BLOCK_E], tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    dD = tl.zeros([S, BLOCK_E], tl.float32)

    for strip in range(0, columns, S * J):
        column, column_ = strip + s * J + j, strip + p  # [S, J], [S J]
        is_column = j < columns - strip - s * J  # [S, J]
        is_edge = is_column[:, :, None] & is_channel[None, None, :]
        edge = (column * channels)[:, :, None] + edges[None, None, :]
        # Where the tile lies, which goes on by a line at a time.
        at = (start + (begin - s) * step_line + column * step_place)[:, :, None] * channels + e[None, None, :]
        down = tl.zeros([S, J, BLOCK_E], tl.float32)
        product = down + 1.0
        if not SUMMARY:
            down = tl.load(states_ptr + edge, is_edge & (begin > 0), 0.0)
        last = tl.zeros([S, BLOCK_E], tl.float32)
        # Every warp is a line behind its left neighbour, and takes from it what enters that line.
        for time in range(begin, end + S - 1):
            line, line_ = time - s, time - p // J  # [S, 1], [S J]
            is_line = (line >= begin) & (line < end)
            is_place_ = (line_ >= begin) & (line_ < end) & (column_ < columns)
            place_ = start + line_ * step_line + column_ * step_place
            row = place_ * K + k
            raw = _load_raw(dt_ptr, row * dt_row, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J)
            B, C = _load_BC(B_ptr + n, C_ptr + n, row * BC_row, BC_row, is_place_, 1, S, J)
            B, C = tl.reshape(B, (S, J)), tl.reshape(C, (S, J))
            mask = (is_line & is_column)[:, :, None] & is_channel[None, None, :]
            dy = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
            if not SUMMARY:  # asked for here, for it is there when the recurrence is, and registers are free
                x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
                from_line = tl.load(from_line_ptr + at, mask, 0.0)
                from_place = tl.load(from_place_ptr + at, mask, 0.0)
                dx = tl.load(sum_ptr + at, mask & (walk > 0), 0.0).to(tl.float32)
            step, slope = _steps(raw, bias, is_line, dy, SOFTPLUS)
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
                left_ = edges_ptr + (line * channels + edges[None, :])  # [S, E]
                entering = tl.load(left_, is_line & (s == 0) & (strip > 0) & is_channel[None, :], 0.0)
                entering = _next_warp(entering, last, S, BLOCK_E)
                right, dg = _chain_and_before(a, down, entering, J)
                dg += dh
                last = _last_place(right, J)
                tl.store(left_, last, is_line & (s == S - 1) & (strip + S * J < columns) & is_channel[None, :])

                ada = dh * from_line + dg * from_place  # a times the gradient of a
                dgB = dg * B[:, :, None]
                dx += dgB * step + D[None, None, :] * dy
                if walk < walks - 1:
                    tl.store(sum_ptr + at, dx, mask)
                else:
                    tl.store(dx_ptr + at, dx, mask)
                draw = (ada * A[None, None, :] + dgB * x) * slope
                dA += tl.sum(ada * step, 1)
                dbias += tl.sum(draw, 1)
                dD += tl.sum(dy * x, 1)
                draw_ = draw_ptr + at
                if RANK == 0:
                    place = start + line * step_line + column * step_place
                    draw_ = draw_ptr + ((place * K + k) * channels)[:, :, None] + e[None, None, :]
                if n > 0:
                    draw += tl.load(draw_, mask, 0.0)
                tl.store(draw_, draw, mask)
                h = from_line + from_place + step * x * B[:, :, None]
                dBC = _sum_channels(dg * (step * x), dy * h, dt_ptr.dtype.element_ty, S, J, BLOCK_E)
                tl.store(parts_ptr + (part + place_)[:, None] * 2 + c, dBC, is_place_[:, None] & (c < 2))
            at += step_line * channels
        if SUMMARY:
            tl.store(products_ptr + edge, product, is_edge)
            tl.store(states_ptr + edge, down, is_edge)
        tl.debug_barrier()  # what this strip hands on is seen in the next

    if not SUMMARY:
        dparams_ptr += ((image * tl.num_programs(1) + tl.program_id(1)) * walks + walk) * 3 * channels + e
        tl.store(dparams_ptr, tl.sum(dA, 0), mask=is_channel)
        tl.store(dparams_ptr + channels, tl.sum(dbias, 0), mask=is_channel)
        tl.store(dparams_ptr + 2 * channels, tl.sum(dD, 0), mask=is_channel)
