# SPDX-License-Identifier: Apache-2.0
"""Recurrences along the places of a tile, a chain in every warp and in 1-D the warps stitched; sums over channels."""

import triton
import triton.language as tl

from .steps import FLOAT32


@triton.jit
def _compose(a1, b1, a2, b2):
    """The map h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _compose_entering(a1, b1, p1, q1, a2, b2, p2, q2):
    """As `_compose`; h -> p h + q gives the state that enters the last step."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def _later(j1, v1, j2, v2):
    """Of two values that of the greater place."""
    return tl.maximum(j1, j2), tl.where(j2 > j1, v2, v1)


@triton.jit
def _last_place(values, J: tl.constexpr):
    """The values of every warp's last place, [S, J, E] -> [S, E]."""
    place = tl.arange(0, J)[None, :, None] + tl.zeros_like(values).to(tl.int32)
    return tl.reduce((place, values), 1, _later)[1]


@triton.jit
def _chain(a, b, entering, J: tl.constexpr):
    """h = a h_before + b along the places of each warp, `entering`, [S, E], before the first; a and b are [S, J, E]."""
    first = tl.arange(0, J)[None, :, None] == 0
    return tl.associative_scan((a, tl.where(first, b + a * entering[:, None, :], b)), 1, _compose)[1]


@triton.jit
def _chain_and_before(a, b, entering, J: tl.constexpr):
    """As `_chain`; and the states before each place, [S, J, E]."""
    first = tl.arange(0, J)[None, :, None] == 0
    entering = entering[:, None, :]
    one = tl.zeros_like(a) + 1.0
    b, before = tl.where(first, b + a * entering, b), tl.where(first, entering, 0.0 * one)
    _, h, _, before = tl.associative_scan((a, b, one, before), 1, _compose_entering)
    return h, before


@triton.jit
def _next_warp(first, last, S: tl.constexpr, BLOCK_E: tl.constexpr):
    """What enters every warp: `first` the first of them, and what `last` says of its neighbour the others, [S, E]."""
    if S == 1:
        return first
    s = tl.arange(0, S)[:, None]
    neighbour = tl.gather(last, tl.maximum(s - 1, 0) + tl.zeros([S, BLOCK_E], tl.int32), 0)
    return tl.where(s == 0, first, neighbour)


@triton.jit
def _scan_line(a, b, carry, J: tl.constexpr, S: tl.constexpr, BLOCK_E: tl.constexpr):
    """h = a h_before + b along a line, the state `carry`, [E], entering it.

    Place j of warp s stands at [s, j] of a and b, [S, J, E]. Returns the states and the states before each place,
    [S, J, E]; the last state and the product of all a, [E].
    """
    # What every warp makes of the state that enters it, and from that the state that does.
    decay, state = tl.associative_scan((a, b), 1, _compose)
    decay, state = _last_place(decay, J), _last_place(state, J)  # [S, E]
    one, zero = tl.full([S, BLOCK_E], 1.0, tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    decay, state, p, q = tl.associative_scan((decay, state, one, zero), 0, _compose_entering)
    is_last = tl.arange(0, S)[:, None] == S - 1
    product = tl.sum(tl.where(is_last, decay, 0.0), 0)
    leaving = tl.sum(tl.where(is_last, decay * carry[None, :] + state, 0.0), 0)
    h, before = _chain_and_before(a, b, p * carry[None, :] + q, J)
    return h, before, leaving, product


@triton.jit
def _sum_channels(first, second, TYPE: tl.constexpr, S: tl.constexpr, J: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sums over channels of two tiles, [S, J, E], in the first two columns of [S J, 16].

    They are a product on the tensor cores with a matrix of ones and zeros: adding lane to lane would take five steps a
    place and tile. What is added is rounded to the sums' type where that is bfloat16, or to tf32 where it is float16.
    """
    both = tl.reshape(tl.join(first, second), (S * J, 2 * BLOCK_E))
    ones = tl.where(tl.arange(0, 2 * BLOCK_E)[:, None] % 2 == tl.arange(0, 16)[None, :], 1.0, 0.0)
    if TYPE == tl.bfloat16:
        return tl.dot(both.to(tl.bfloat16), ones.to(tl.bfloat16))
    if TYPE == tl.float16:
        return tl.dot(both, ones)  # by default one product, of tf32 where the card has that
    return tl.dot(both, ones, input_precision=FLOAT32)
