# SPDX-License-Identifier: Apache-2.0
"""Arithmetic as the chip does it, on arrays of lanes.

Exact: integers, float32 sums, products and fused multiply-adds with their one rounding, conversions, selections and
comparisons, subnormal numbers among them. Not exact: which NaN comes out; and the functions of the special unit, which
are rounded here from float64 where the chip is within two units in the last place.
"""

import numpy as np

Array = np.ndarray
SMALLEST = np.float32(2.0**-126)  # normal number
COMPARE = {
    'LT': np.less,
    'LE': np.less_equal,
    'GT': np.greater,
    'GE': np.greater_equal,
    'EQ': np.equal,
    'NE': np.not_equal,
}


# ---- floating point --------------------------------------------------------------------------------------------------


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float32, rounded once.

    The product is exact in float64 and the sum is rounded there. To round it again is wrong only where it then lies
    half-way between two float32 numbers, or becomes subnormal: there the sum is first made odd in its last bit if it
    is inexact, which no second rounding mistakes for half-way.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    bits = total.view(np.int64)
    doubtful = ((bits & 0x1FFFFFFF) == 0x10000000) | ((np.abs(total) < SMALLEST) & (total != 0))
    if doubtful.any():
        back = total - product
        error = (product - (total - back)) + (c - back)
        odd = np.where((error != 0) & (bits & 1 == 0), np.where((error > 0) == (total > 0), bits + 1, bits - 1), bits)
        result = np.where(doubtful, odd.view(np.float64).astype(np.float32), result)
    return result


def flush(x: Array) -> Array:
    """x, with zero of its sign in place of subnormal numbers."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def minimum(a: Array, b: Array) -> Array:
    """The smaller number, the one that is a number, and -0 before +0."""
    return np.where(a == b, _bits_to_float(_bits(a) | _bits(b)), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    return np.where(a == b, _bits_to_float(_bits(a) & _bits(b)), np.fmax(a, b))


def compare_floats(how: str, a: Array, b: Array) -> Array:
    """Comparison by its name; with a U at its end it also holds where one is no number."""
    if how in ('NAN', 'NUM'):
        unordered = np.isnan(a) | np.isnan(b)
        return unordered if how == 'NAN' else ~unordered
    result = COMPARE[how.removesuffix('U')](a, b)
    if how.endswith('U'):
        return result | np.isnan(a) | np.isnan(b)
    return result & ~(np.isnan(a) | np.isnan(b)) if how == 'NE' else result


SPECIAL = {
    'EX2': np.exp2,
    'RCP': np.reciprocal,
    'RSQ': lambda x: 1 / np.sqrt(x),
    'SQRT': np.sqrt,
    'LG2': np.log2,
}


def special_function(name: str, x: Array) -> Array:
    """A function of the special unit, which takes and returns no subnormal numbers."""
    return flush(SPECIAL[name](flush(x).astype(np.float64)).astype(np.float32))


def _bits(x: Array) -> Array:
    return np.asarray(x, np.float32).view(np.uint32)


def _bits_to_float(x: Array) -> Array:
    return np.asarray(x, np.uint32).view(np.float32)


# ---- half precision --------------------------------------------------------------------------------------------------


def float_to_half(x: Array) -> Array:
    """Bits of float16, rounded to nearest even."""
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def half_to_float(bits: Array) -> Array:
    return np.asarray(bits & 0xFFFF, np.uint16).view(np.float16).astype(np.float32)


def float_to_bfloat(x: Array) -> Array:
    """Bits of bfloat16, rounded to nearest even."""
    bits = _bits(x)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def bfloat_to_float(bits: Array) -> Array:
    return _bits_to_float((np.asarray(bits, np.uint32) & 0xFFFF) << 16)


def unpack(word: Array, decode=half_to_float) -> tuple[Array, Array]:
    """Both numbers of a packed pair, the lower first."""
    return decode(word), decode(word >> 16)


# ---- between integers and floating point -----------------------------------------------------------------------------


def integer_to_float(x: Array, upwards: bool) -> Array:
    """An integer of up to 64 bits in float32, rounded to nearest even or upwards."""
    result = x.astype(np.float32)
    if upwards:
        exact = np.float64 if x.itemsize < 8 else object  # which compares Python's integers
        low = np.less(result.astype(exact), x.astype(exact)).astype(bool)
        result = np.where(low, np.nextafter(result, np.float32(np.inf)), result)
    return result


def float_to_integer(x: Array, bits: int, signed: bool, nan: int) -> Array:
    """Rounded towards zero and kept within the type, in int64 or uint64."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    kind = np.int64 if signed else np.uint64
    whole = np.trunc(np.where(np.isnan(x), 0, x).astype(np.float64))
    inside = (whole >= low) & (whole < float(high + 1))
    result = np.where(inside, whole, 0).astype(kind)
    result = np.where(inside, result, np.where(whole < 0, kind(low), kind(high)))
    return np.where(np.isnan(x), kind(nan), result)


# ---- bits ------------------------------------------------------------------------------------------------------------


def lookup(table: int, a: Array, b: Array, c: Array) -> Array:
    """Any function of three bits, by its truth table: bit 4 a + 2 b + c of the table is the result."""
    result = None
    for i in range(8):
        if table >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = term if result is None else result | term
    return (a & ~a) if result is None else result


def permute_bytes(a: Array, selector: Array, b: Array) -> Array:
    """Four bytes out of the eight of a and b, each by a digit of the selector; with its high bit set, their signs."""
    both = np.asarray(a, np.uint64) | np.asarray(b, np.uint64) << np.uint64(32)
    result: Array = np.uint32(0)
    for i in range(4):
        digit = np.asarray(selector >> np.uint32(4 * i), np.uint64) & np.uint64(15)
        byte = ((both >> ((digit & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        result = result | np.where(digit > 7, sign, byte) << np.uint32(8 * i)
    return result
