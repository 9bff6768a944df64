# SPDX-License-Identifier: Apache-2.0
"""The forward pass of 1-D scans; it also finds the summary of a band, and what the backward pass reads."""

import triton
import triton.language as tl

from .recurrence import _scan_line
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
def _scan_forward_1d(
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

    Walk k N + n is order k and state n. With TERMS write a times the state of the place before to y.
    """
    HALVES: tl.constexpr = dt_ptr.dtype.element_ty == tl.bfloat16
    image, images, e, is_channel = _program(channels, WIDE, EVEN)
    K = walks // states  # number of orders
    edges, other = _edges(image, images, channels, e)
    states_ptr = edges_ptr + other
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)

    for w in range(walk, walk + walks_here):
        k, n = w // states, w % states
        lines, columns, start, step_line, step_column = _directions((orders >> (2 * k)) & 3, image, height, width)
        begin, end = _band(lines * columns)
        place, column, line = _first(begin, columns, start, step_line, step_column)
        A, D, bias, weight = _parameters(parameters_ptr, k, n, e, is_channel, channels, rank, states, RANK, HALVES)
        carry, product = tl.zeros([BLOCK_E], tl.float32), tl.full([BLOCK_E], 1.0, tl.float32)
        if not SUMMARY:
            carry = tl.load(states_ptr + edges, is_channel & (begin > 0), 0.0)
        for strip in range(begin, end, S * J):
            is_place, is_place_ = s * J + j < end - strip, p < end - strip  # of the tile, [S, J] and [S J]
            row = _after(place, column, line, p, S * J)[0] * K + k
            raw = _load_raw(dt_ptr, row * dt_row, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J)
            B, C = _load_BC(B_ptr + n, C_ptr + n, row * BC_row, BC_row, is_place_, 1, S, J)
            B, C = tl.reshape(B, (S, J)), tl.reshape(C, (S, J))
            at = _after(place, column, line, s * J + j, S * J)[0] * channels
            at = at[:, :, None] + e[None, None, :]
            mask = is_place[:, :, None] & is_channel[None, None, :]
            x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
            step, slope = _steps(raw, bias, is_place, x, SOFTPLUS)
            a = tl.exp2(step * (A * LOG2E)[None, None, :])
            h, before, carry, decay = _scan_line(a, step * x * B[:, :, None], carry, J, S, BLOCK_E)
            product *= decay
            if TERMS:
                tl.store(y_ptr + at, a * before, mask)
            elif not SUMMARY:
                y = h
                if HAS_C:
                    y = h * C[:, :, None] + D[None, None, :] * x
                    if w > 0:
                        y += tl.load(sum_ptr + at, mask, 0.0)
                if HAS_C and w < walks - 1:
                    tl.store(sum_ptr + at, y, mask)
                else:
                    tl.store(y_ptr + at, y, mask)
            place, column = _after(place, column, line, S * J, S * J)
        if SUMMARY:
            tl.store(edges_ptr + edges, product, is_channel)
            tl.store(states_ptr + edges, carry, is_channel)
        tl.debug_barrier()  # what this walk adds is seen in the next
