# SPDX-License-Identifier: Apache-2.0
"""The backward pass of one walk of a 1-D scan; it also finds the summary of a band."""

import triton
import triton.language as tl

from .recurrence import _scan_line, _sum_channels
from .steps import LOG2E, _load_raw, _steps
from .walk import (
    _INTEGERS,
    _POINTERS,
    BLOCK_E,
    _after,
    _band,
    _directions,
    _edges,
    _first,
    _load_BC,
    _parameters,
    _program,
)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _scan_backward_1d(
    grad_ptr,
    x_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    parameters_ptr,
    before_ptr,
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
    """Follow one walk backwards: places count along the opposite order.

    With dh the gradient of h, a place hands a dh on to the next.

    before_ptr: a times the state of the place before, what the forward pass writes with TERMS, (batch, H, W, E).
    draw_ptr: Gradient of the steps before bias and softplus, which adds up over states, (batch, H, W, K, E); of
        low-rank ones that of this order alone, (batch, H, W, E).
    parts_ptr: Gradients of B and C, by blocks of channels, (blocks, batch, H, W, 2).
    dparams_ptr: Gradients of A, dt_bias and D, by images and bands, (batch, bands, walks, 3, E).
    """
    HALVES: tl.constexpr = dt_ptr.dtype.element_ty == tl.bfloat16
    image, images, e, is_channel = _program(channels, WIDE, EVEN)
    K = walks // states  # number of orders
    edges, other = _edges(image, images, channels, e)
    states_ptr = edges_ptr + other
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)
    c = tl.arange(0, 16)[None, :]  # B and C, and as many as a product has columns
    part = images * (tl.program_id(0) % tl.cdiv(channels, BLOCK_E)) * height * width  # of this block of channels

    k, n = walk // states, walk % states
    lines, columns, start, step_line, step_column = _directions(((orders >> (2 * k)) & 3) ^ 2, image, height, width)
    begin, end = _band(lines * columns)
    first, column, line = _first(begin, columns, start, step_line, step_column)
    A, D, bias, weight = _parameters(parameters_ptr, k, n, e, is_channel, channels, rank, states, RANK, HALVES)
    dA, dbias = tl.zeros([S, BLOCK_E], tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    dD = tl.zeros([S, BLOCK_E], tl.float32)

    carry, product = tl.zeros([BLOCK_E], tl.float32), tl.full([BLOCK_E], 1.0, tl.float32)
    if not SUMMARY:
        carry = tl.load(states_ptr + edges, is_channel & (begin > 0), 0.0)
    for strip in range(begin, end, S * J):
        is_place, is_place_ = s * J + j < end - strip, p < end - strip  # of the tile, [S, J] and [S J]
        place_ = _after(first, column, line, p, S * J)[0]
        row = place_ * K + k
        raw = _load_raw(dt_ptr, row * dt_row, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J)
        B, C = _load_BC(B_ptr + n, C_ptr + n, row * BC_row, BC_row, is_place_, 1, S, J)
        B, C = tl.reshape(B, (S, J)), tl.reshape(C, (S, J))
        place = _after(first, column, line, s * J + j, S * J)[0]
        at = (place * channels)[:, :, None] + e[None, None, :]
        mask = is_place[:, :, None] & is_channel[None, None, :]
        dy = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
        step, slope = _steps(raw, bias, is_place, dy, SOFTPLUS)
        a = tl.exp2(step * (A * LOG2E)[None, None, :])
        dh = dy
        if HAS_C:
            dh = dy * C[:, :, None]
        h, before, carry, decay = _scan_line(a, a * dh, carry, J, S, BLOCK_E)
        product *= decay
        dh += before
        if not SUMMARY:
            x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
            ah = tl.load(before_ptr + at, mask, 0.0)
            dhB = dh * B[:, :, None]
            dx = dhB * step + D[None, None, :] * dy
            if walk > 0:
                dx += tl.load(sum_ptr + at, mask, 0.0)
            if walk < walks - 1:
                tl.store(sum_ptr + at, dx, mask)
            else:
                tl.store(dx_ptr + at, dx, mask)
            ada = dh * ah  # a times the gradient of a
            draw = (ada * A[None, None, :] + dhB * x) * slope
            dA += tl.sum(ada * step, 1)
            dbias += tl.sum(draw, 1)
            dD += tl.sum(dy * x, 1)
            draw_ = draw_ptr + at
            if RANK == 0:
                draw_ = draw_ptr + ((place * K + k) * channels)[:, :, None] + e[None, None, :]
            if n > 0:
                draw += tl.load(draw_, mask, 0.0)
            tl.store(draw_, draw, mask)
            h = ah + step * x * B[:, :, None]
            dBC = _sum_channels(dh * (step * x), dy * h, dt_ptr.dtype.element_ty, S, J, BLOCK_E)
            tl.store(parts_ptr + (part + place_)[:, None] * 2 + c, dBC, is_place_[:, None] & (c < 2))
        first, column = _after(first, column, line, S * J, S * J)

    if SUMMARY:
        tl.store(edges_ptr + edges, product, is_channel)
        tl.store(states_ptr + edges, carry, is_channel)
    else:
        dparams_ptr += ((image * tl.num_programs(1) + tl.program_id(1)) * walks + walk) * 3 * channels + e
        tl.store(dparams_ptr, tl.sum(dA, 0), mask=is_channel)
        tl.store(dparams_ptr + channels, tl.sum(dbias, 0), mask=is_channel)
        tl.store(dparams_ptr + 2 * channels, tl.sum(dD, 0), mask=is_channel)
