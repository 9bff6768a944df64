# SPDX-License-Identifier: Apache-2.0
"""The step sizes of a tile."""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# What a product on the tensor cores takes for float32: three of tf32, or on AMD, whose cores have it, float32 itself.
FLOAT32 = tl.constexpr('ieee' if torch.version.hip else 'tf32x3')


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
    root = tl.rsqrt(1.0 + u)  # squared it is what a division would take several times as long for
    return tl.maximum(v, 0.0) + u * q, tl.where(v >= 0, root, u * root) * root


@triton.jit
def _load_weight(ptr, e, is_channel, channels, rank, RANK: tl.constexpr, HALVES: tl.constexpr):
    """The weights of low-rank steps, (R, E) in memory, as [E, RANK], and what rounding has left of them.

    With HALVES, for steps in bfloat16, they are rounded to that, and the rest is, too. Together they hold 16 bits of a
    weight, and the products with them are exact in float32.
    """
    r = tl.arange(0, RANK)
    weight = tl.load(ptr + r[None, :] * channels + e[:, None], is_channel[:, None] & (r < rank)[None, :], 0.0)
    rest = 0
    if HALVES:
        rounded = weight.to(tl.bfloat16)
        weight, rest = rounded, (weight - rounded.to(tl.float32)).to(tl.bfloat16)
    return weight, rest


@triton.jit
def _load_raw(
    ptr,
    at,
    weights,
    is_place,
    e,
    is_channel,
    rank,
    RANK: tl.constexpr,
    HALVES: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
):
    """The step sizes of a tile before bias and softplus, [S, J, E]; low-rank ones are a product on the tensor cores.

    The weights stand on the left: as rows, channels fill the cores however few places there are, and are divided among
    warps, so that none reads all weights.

    at: Where the step sizes of the places lie, [S J].
    is_place: Whether there is such a place, [S J].
    weights: What `_load_weight` has loaded; without low-rank steps, RANK = 0, anything.
    """
    if RANK == 0:
        at, is_place = tl.reshape(at, (S, J)), tl.reshape(is_place, (S, J))
        mask = is_place[:, :, None] & is_channel[None, None, :]
        raw = tl.load(ptr + at[:, :, None] + e[None, None, :], mask, 0.0).to(tl.float32)
    else:
        r = tl.arange(0, RANK)
        low = tl.load(ptr + r[:, None] + at[None, :], (r < rank)[:, None] & is_place[None, :], 0.0)  # [R, S J]
        weight, rest = weights
        if HALVES:
            raw = tl.dot(rest, low, tl.dot(weight, low))
        else:
            raw = tl.dot(weight, low.to(tl.float32), input_precision=FLOAT32)
        raw = tl.reshape(tl.trans(raw), (S, J, raw.shape[0]))
    return raw


@triton.jit
def _steps(raw, bias, is_place, like, SOFTPLUS: tl.constexpr):
    """The step sizes of a tile from `raw`, and their derivative, [S, J, E]; 0 where there is no place.

    is_place: Whether there are lines, [S, 1], or places, [S, J].
    like: A tile as it was loaded. No bit of it is taken, but what takes none is found late, by the compiler's second
        half: the first lays out all that follows as it, and moves nothing but `raw` from where the product has left it.
    """
    none = (like.to(tl.int32, bitcast=True) & 1) >> 1
    raw = (none | raw.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    raw += tl.where(is_place[:, :, None], bias[None, None, :], float('-inf') if SOFTPLUS else 0.0)
    slope = tl.zeros_like(raw) + 1.0
    if SOFTPLUS:
        raw, slope = _softplus(raw)
    return raw, slope
