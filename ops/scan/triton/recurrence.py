# SPDX-License-Identifier: Apache-2.0
"""The recurrence along one line of a tile: a chain in every warp, and the warps stitched."""

import triton
import triton.language as tl


@triton.jit
def _compose(a1, b1, a2, b2):
    """The map h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _compose_entering(a1, b1, p1, q1, a2, b2, p2, q2):
    """As `_compose`; h -> p h + q gives the state that enters the last step."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def _scan_line(a, b, carry, J: tl.constexpr, S: tl.constexpr, BLOCK_E: tl.constexpr):
    """h = a h_before + b along a line, the state `carry`, [E], entering it.

    Place j of warp s stands at [s, j] of a and b, [S, J, E]. Returns the states and the states before each place,
    [S, J, E]; the last state and the product of all a, [E].
    """
    j = tl.arange(0, J)[None, :, None]
    # What every warp makes of the state that enters it, and from that the state that does.
    decay, state = tl.associative_scan((a, b), 1, _compose)
    decay = tl.sum(tl.where(j == J - 1, decay, 0.0), 1)  # [S, E]
    state = tl.sum(tl.where(j == J - 1, state, 0.0), 1)
    one, zero = tl.full([S, BLOCK_E], 1.0, tl.float32), tl.zeros([S, BLOCK_E], tl.float32)
    decay, state, p, q = tl.associative_scan((decay, state, one, zero), 0, _compose_entering)
    entering = (p * carry[None, :] + q)[:, None, :]
    is_last = tl.arange(0, S)[:, None] == S - 1
    product = tl.sum(tl.where(is_last, decay, 0.0), 0)
    leaving = tl.sum(tl.where(is_last, decay * carry[None, :] + state, 0.0), 0)

    b = tl.where(j == 0, b + a * entering, b)
    one = tl.full([S, J, BLOCK_E], 1.0, tl.float32)
    before = tl.where(j == 0, entering, 0.0 * one)
    _, state, _, before = tl.associative_scan((a, b, one, before), 1, _compose_entering)
    return state, before, leaving, product
