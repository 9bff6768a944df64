# SPDX-License-Identifier: Apache-2.0
"""The step sizes of a tile."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(v):
    """softplus(v) = max(v, 0) + log1p(u) with u = exp(-|v|), and its derivative.

    log1p(u) = u q(u) with a polynomial q, within 2e-7: the card's logarithm is inaccurate where its argument is near 1.
    """
    u = tl.exp2(-tl.abs(v) * LOG2E)
    q = 0.0051058256067335606 * u - 0.028991956263780594
    q = q * u + 0.07738073915243149
    q = q * u - 0.13590599596500397
    q = q * u + 0.1907130926847458
    q = q * u - 0.2483394593000412
    q = q * u + 0.3331793546676636
    q = q * u - 0.4999943673610687
    q = q * u + 0.9999999403953552
    return tl.maximum(v, 0.0) + u * q, tl.where(v >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def _load_steps(
    like,
    dt_ptr,
    at,
    weight_ptr,
    bias,
    e,
    is_channel,
    is_place,
    channels,
    rank,
    SOFTPLUS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The step sizes of a tile, 0 where there is no place, and their derivative, [S, J, E].

    like: A tile as it was loaded; sums begin with it, less itself, so that the compiler lays them out as it.
    at: Where the step sizes of the places lie, [S, J].
    weight_ptr: The weights of low-rank steps, (R, E).
    """
    if LOW_RANK:
        raw = bias[None, None, :] + (like - like)
        for r in tl.range(0, rank, loop_unroll_factor=4):
            low = tl.load(dt_ptr + at + r).to(tl.float32)
            weight = tl.load(weight_ptr + r * channels + e, mask=is_channel, other=0.0)
            raw = raw + low[:, :, None] * weight[None, None, :]
    else:
        raw = tl.load(dt_ptr + at[:, :, None] + e[None, None, :], mask=is_channel[None, None, :], other=0.0)
        raw = raw.to(tl.float32) + bias[None, None, :]
    step, slope = raw, 1.0
    if SOFTPLUS:
        step, slope = _softplus(raw)
    return tl.where(is_place[:, :, None], step, 0.0), slope
