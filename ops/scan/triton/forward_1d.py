# SPDX-License-Identifier: Apache-2.0
"""The forward pass of 1-D scans; it also finds the summary of a band, and what the backward pass reads."""

import triton
import triton.language as tl

from .recurrence import _scan_line
from .steps import LOG2E, _load_raw, _steps
from .walk import _INTEGERS, _POINTERS, _bounds, _choose, _directions, _offset, _parameters


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _scan_forward_1d(
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

    Walk k N + n is order k and state n. With TERMS write a times the state of the place before to y.
    Grid: batch x bands x blocks of channels.
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
    carry_ptr += part * channels + e
    s, j, p = tl.arange(0, S)[:, None], tl.arange(0, J)[None, :], tl.arange(0, S * J)
    is_C = tl.arange(0, 2)[None, :] == 1

    for w in range(walk, walk + walks_here):
        k, n = w // states, w % states
        order = (orders >> (2 * k)) & 3
        columns, begin_line, end_line, begin, end = _bounds(order, height, width, band, bands, 1)
        start, step_line, step_place = _directions(order, height, width, width * channels, channels, WIDE)
        dt_start, dt_line, dt_place = _directions(order, height, width, dt_row, dt_column, WIDE)
        BC_start, BC_line, BC_place = _directions(order, height, width, BC_row, BC_column, WIDE)
        dt_ = dt_ptr + image * dt_image + k.to(tl.int64) * dt_order
        BC_ = _choose(is_C, C_ptr, B_ptr) + image * BC_image + k.to(tl.int64) * BC_order + n
        A, D, bias, weight = _parameters(
            A_ptr, D_ptr, bias_ptr, weight_ptr, k, n, e, is_channel, channels, rank, states,
            HAS_D, HAS_BIAS, RANK, HALVES,
        )  # fmt: skip

        carry, product = tl.zeros([BLOCK_E], tl.float32), tl.full([BLOCK_E], 1.0, tl.float32)
        if HAS_CARRY:
            carry = tl.load(carry_ptr + half, is_channel, 0.0)
        for strip in range(begin, end, S * J):
            place, place_ = strip + s * J + j, strip + p  # [S, J], [S J]
            is_place, is_place_ = place < end, place_ < end
            dt_at = _offset(dt_start, dt_line, dt_place, place_, columns)
            raw = _load_raw(dt_, dt_at, weight, is_place_, e, is_channel, rank, RANK, HALVES, S, J, BLOCK_E)
            BC_at = _offset(BC_start, BC_line, BC_place, place_, columns)
            BC = tl.load(BC_ + BC_at[:, None], is_place_[:, None], 0.0).to(tl.float32)
            B, C = tl.split(tl.reshape(BC, (S, J, 2)))
            at = _offset(start, step_line, step_place, place, columns)
            at = at[:, :, None] + e[None, None, :]
            mask = is_place[:, :, None] & is_channel[None, None, :]
            x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
            step, slope = _steps(raw, bias, x, SOFTPLUS)
            step = tl.where(is_place[:, :, None], step, 0.0)
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
        if SUMMARY:
            tl.store(carry_ptr, product, is_channel)
            tl.store(carry_ptr + half, carry, is_channel)
        tl.debug_barrier()  # what this walk adds is seen in the next
