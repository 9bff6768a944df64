# SPDX-License-Identifier: Apache-2.0
"""What instructions do that read operands and write results, lane by lane: the table of them.

An entry names the opcode, with the modifiers that make it another instruction; its outputs and inputs, as letters; and
the modifiers that its function understands, which is given those that are there. Whatever has another modifier, or
other operands, is unknown. A `U` before an opcode means the same for a whole warp.

Letters: u an integer of 32 bits, i a signed one, c one of which a negative is its complement and one, in 64 bits; w one
of 64 bits in two registers; f a float32; h two halves, or one twice; p a predicate; n a number that stands in the
instruction. A question mark says that it may be absent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import (
    COMPARE,
    bfloat_to_float,
    compare_floats,
    float_to_bfloat,
    float_to_half,
    float_to_integer,
    flush,
    fused_multiply_add,
    half_to_float,
    integer_to_float,
    lookup,
    maximum,
    minimum,
    permute_bytes,
    special_function,
    unpack,
)

U32, U64, I64 = np.uint32, np.uint64, np.int64
Modifiers = frozenset[str]


@dataclass(frozen=True)
class Operation:
    """An entry of the table.

    Args:
        compute: What takes the modifiers and the inputs, and returns the output or outputs.
        outputs: Letters of the outputs.
        inputs: Letters of the inputs.
        needed: Modifiers by which the entry is found.
        understood: Modifiers that may be there.
    """

    compute: Callable[..., Any]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    needed: Modifiers
    understood: Modifiers


OPERATIONS: dict[str, list[Operation]] = {}


def operation(opcode: str, form: str, understood: str = '') -> Callable:
    """Enter a function into the table; `form` is 'outputs = inputs'."""
    name, *needed = opcode.split('.')
    outputs, inputs = (tuple(part.split()) for part in form.split('='))

    def enter(compute: Callable) -> Callable:
        entry = Operation(compute, outputs, inputs, frozenset(needed), frozenset(needed) | set(understood.split()))
        OPERATIONS.setdefault(name, []).append(entry)
        return compute

    return enter


def find_operation(name: str, modifiers: tuple[str, ...]) -> Operation | None:
    """The entry that most of the modifiers choose, if it understands all of them."""
    entries = OPERATIONS.get(name) or (OPERATIONS.get(name[1:]) if name[0] == 'U' else None) or []
    fitting = [entry for entry in entries if entry.needed <= set(modifiers) <= entry.understood]
    return max(fitting, key=lambda entry: len(entry.needed), default=None)


def signed(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, U32).view(np.int32)


def carry_in(predicate: np.ndarray | None) -> np.ndarray:
    return U64(0) if predicate is None else predicate.astype(U64)


def choose(predicate: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(predicate, first, second)


def combine(modifiers: Modifiers, result: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two predicates that a comparison sets: itself with another predicate, and its opposite with that."""
    join = np.bitwise_or if 'OR' in modifiers else np.bitwise_xor if 'XOR' in modifiers else np.bitwise_and
    return join(result, other), join(~result, other)


# ---- integers --------------------------------------------------------------------------------------------------------


@operation('IADD3', 'u p? p? = c c c')
def add(modifiers, a, b, c):
    """Negative operands come as their complement and a one, so that a difference carries unless it borrows."""
    total = a + b + c
    return total, total >> U64(32) >= 1, total >> U64(32) >= 2


@operation('IADD3.X', 'u p? p? = u u u p p?')
def add_with_carry(modifiers, a, b, c, first, second):
    total = np.asarray(a, U64) + b + c + carry_in(first) + carry_in(second)
    return total, total >> U64(32) >= 1, total >> U64(32) >= 2


@operation('IADD3.64', 'w = w w w')
def add_wide(modifiers, a, b, c):
    return a + b + c


@operation('VIADD', 'u = u u')
def add_two(modifiers, a, b):
    return a + b


@operation('IABS', 'u = i')
def absolute(modifiers, a):
    return np.abs(a)


@operation('IMAD', 'u = u u u', 'MOV U32 SHL IADD')
def multiply_add(modifiers, a, b, c):
    return a * b + c


@operation('IMAD.X', 'u = u u u p', 'U32')
def multiply_add_carry(modifiers, a, b, c, carry):
    return a * b + c + carry.astype(U32)


def product(modifiers, a, b):
    """All 64 bits of a product."""
    if 'U32' in modifiers:
        return np.asarray(a, U64) * np.asarray(b, U64)
    return (np.asarray(signed(a), I64) * np.asarray(signed(b), I64)).view(U64)


@operation('IMAD.WIDE', 'w p? = u u w', 'U32')
def multiply_wide(modifiers, a, b, c):
    total = product(modifiers, a, b) + c
    return total, total < c


@operation('IMAD.HI', 'u p? = u u w', 'U32')
def multiply_high(modifiers, a, b, c):
    total = product(modifiers, a, b) + c
    return total >> U64(32), total < c


@operation('LEA', 'u p? = u c n')
def shift_add(modifiers, a, b, shift):
    total = np.asarray(a << U32(shift), U64) + b
    return total, total >> U64(32) != 0


@operation('LEA.HI', 'u p? = u u u n p?', 'X')
def shift_add_high(modifiers, low, b, high, shift, carry):
    whole = np.asarray(low, U64) | np.asarray(high, U64) << U64(32)
    total = ((whole << U64(shift)) >> U64(32)) + b + carry_in(carry)
    return total, total >> U64(32) != 0


@operation('LEA.HI.SX32', 'u = i u n p?', 'X')
def shift_add_sign(modifiers, a, b, shift, carry):
    whole = np.asarray(a, I64).view(U64)
    return ((whole << U64(shift)) >> U64(32)) + b + carry_in(carry)


@operation('SHF.L', 'u = u u u', 'U32 U64 HI')
def shift_left(modifiers, low, shift, high):
    """Of the pair (high, low), the high word with HI; without, the low one."""
    whole = np.asarray(low, U64) | np.asarray(high, U64) << U64(32)
    most = U64(63) if 'U64' in modifiers else U64(32)
    whole = whole << np.minimum(np.asarray(shift, U64), most)
    return whole >> U64(32) if 'HI' in modifiers else whole


@operation('SHF.R', 'u = u u u', 'U32 S32 U64 S64 HI')
def shift_right(modifiers, low, shift, high):
    whole = np.asarray(low, U64) | np.asarray(high, U64) << U64(32)
    most = 63 if modifiers & {'U64', 'S64'} else 32
    amount = np.minimum(shift, U32(most))
    if modifiers & {'S32', 'S64'}:
        whole = (whole.view(I64) >> np.asarray(amount, I64)).view(U64)
    else:
        whole = whole >> np.asarray(amount, U64)
    return whole >> U64(32) if 'HI' in modifiers else whole


@operation('SGXT', 'u = i u', 'U32')
def extend_sign(modifiers, a, bits):
    """The lowest bits, and the last of them in all bits above, or zeros with U32."""
    above = np.int32(32) - np.minimum(signed(bits), 32)
    wide = np.asarray(a, I64) << np.asarray(above, I64)
    low = np.asarray(wide, U64) & U64(0xFFFFFFFF)
    return low >> np.asarray(above, U64) if 'U32' in modifiers else signed(low.astype(U32)) >> np.minimum(above, 31)


@operation('LOP3.LUT', 'p? u = u u u n p')
def logic(modifiers, a, b, c, table, predicate):
    result = lookup(table, a, b, c)
    return (result != 0) | predicate, result


@operation('PRMT', 'u = u u u')
def permute(modifiers, a, selector, b):
    return permute_bytes(a, selector, b)


@operation('VIMNMX', 'u = u u p', 'U32')
def integer_minimum(modifiers, a, b, is_minimum):
    if 'U32' not in modifiers:
        a, b = signed(a), signed(b)
    return choose(is_minimum, np.minimum(a, b), np.maximum(a, b))


@operation('VIADDMNMX', 'u = u u u p', 'U32')
def add_minimum(modifiers, a, b, c, is_minimum):
    return integer_minimum(modifiers, a + b, c, is_minimum)


@operation('POPC', 'u = u')
def count_bits(modifiers, a):
    return np.bitwise_count(a)


@operation('ISETP', 'p p = u u p p?', 'U32 EX AND OR XOR ' + ' '.join(COMPARE))
def compare(modifiers, a, b, other, low):
    """With EX the high words are compared, and `low` says how the low ones did."""
    if 'U32' not in modifiers:
        a, b = signed(a), signed(b)
    (how,) = modifiers & COMPARE.keys()
    result = COMPARE[how](a, b)
    if 'EX' in modifiers:
        strict = {'LE': np.less, 'GE': np.greater}.get(how, COMPARE[how])(a, b)
        result = strict | low if how == 'NE' else result & low if how == 'EQ' else strict | ((a == b) & low)
    return combine(modifiers, result, other)


# ---- predicates and moves --------------------------------------------------------------------------------------------


@operation('PLOP3.LUT', 'p p = p p p n n')
def predicate_logic(modifiers, a, b, c, first, second):
    return lookup(first, a, b, c), lookup(second, a, b, c)


@operation('MOV', 'u = u')
def move(modifiers, a):
    return a


@operation('SEL', 'u = u u p')
def select(modifiers, a, b, predicate):
    return choose(predicate, a, b)


# ---- float32 ---------------------------------------------------------------------------------------------------------


def flushed(modifiers, *values):
    return tuple(map(flush, values)) if 'FTZ' in modifiers else values


@operation('FADD', 'f = f f', 'FTZ')
def float_add(modifiers, a, b):
    a, b = flushed(modifiers, a, b)
    return flushed(modifiers, a + b)[0]


@operation('FMUL', 'f = f f', 'FTZ')
def float_multiply(modifiers, a, b):
    a, b = flushed(modifiers, a, b)
    return flushed(modifiers, a * b)[0]


@operation('FFMA', 'f = f f f', 'FTZ')
def float_multiply_add(modifiers, a, b, c):
    return flushed(modifiers, fused_multiply_add(*flushed(modifiers, a, b, c)))[0]


@operation('FMNMX', 'f = f f p', 'FTZ')
def float_minimum(modifiers, a, b, is_minimum):
    a, b = flushed(modifiers, a, b)
    return choose(is_minimum, minimum(a, b), maximum(a, b))


@operation('FSEL', 'f = f f p')
def float_select(modifiers, a, b, predicate):
    return choose(predicate, a, b)


COMPARE_FLOATS = {*COMPARE, *(f'{how}U' for how in COMPARE), 'NUM', 'NAN'}


@operation('FSETP', 'p p = f f p', 'FTZ AND OR XOR ' + ' '.join(COMPARE_FLOATS))
def float_compare(modifiers, a, b, other):
    (how,) = modifiers & COMPARE_FLOATS
    return combine(modifiers, compare_floats(how, *flushed(modifiers, a, b)), other)


@operation('FSET.BF', 'f = f f p', 'FTZ AND OR XOR ' + ' '.join(COMPARE_FLOATS))
def float_compare_to_float(modifiers, a, b, other):
    return choose(float_compare(modifiers - {'BF'}, a, b, other)[0], np.float32(1), np.float32(0))


@operation('MUFU', 'f = f', 'EX2 RCP RSQ SQRT LG2')
def special(modifiers, a):
    (name,) = modifiers
    return special_function(name, a)


@operation('FRND', 'f = f', 'FTZ FLOOR CEIL TRUNC')
def float_round(modifiers, a):
    (a,) = flushed(modifiers, a)
    return (np.floor if 'FLOOR' in modifiers else np.ceil if 'CEIL' in modifiers else
            np.trunc if 'TRUNC' in modifiers else np.rint)(a)  # fmt: skip


# ---- half precision --------------------------------------------------------------------------------------------------


@operation('HADD2.F32', 'f = h h')
def half_add_to_float(modifiers, a, b):
    return half_to_float(a) + half_to_float(b)


def halves(modifiers):
    """How the numbers of a packed pair are decoded and encoded."""
    if 'BF16_V2' in modifiers:
        return bfloat_to_float, float_to_bfloat
    return half_to_float, float_to_half


def packed(modifiers, function, *words):
    """A function of the lower numbers of packed pairs and of the upper ones, computed in float64 and rounded once."""
    decode, encode = halves(modifiers)
    low, high = zip(*(unpack(word, decode) for word in words), strict=True)
    results = [function(*(x.astype(np.float64) for x in part)) for part in (low, high)]
    if encode is float_to_half:
        low, high = (x.astype(np.float16).view(np.uint16).astype(U32) for x in results)
    else:
        low, high = (encode(round_to_odd_float(x)) for x in results)
    return low | high << U32(16)


def round_to_odd_float(x):
    """float64 in float32, odd in its last bit where it is inexact, so that another rounding is right."""
    near = x.astype(np.float32)
    toward_zero = np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    inexact = (toward_zero.astype(np.float64) != x) & np.isfinite(x)
    return np.where(inexact, (toward_zero.view(U32) | U32(1)).view(np.float32), near)


@operation('HADD2', 'u = h h', 'BF16_V2')
def half_add(modifiers, a, b):
    return packed(modifiers, lambda a, b: a + b, a, b)


@operation('HMUL2', 'u = h h', 'BF16_V2')
def half_multiply(modifiers, a, b):
    return packed(modifiers, lambda a, b: a * b, a, b)


@operation('HFMA2', 'u = h h h', 'MMA BF16_V2')
def half_multiply_add(modifiers, a, b, c):
    return packed(modifiers, lambda a, b, c: a * b + c, a, b, c)


# ---- conversions -----------------------------------------------------------------------------------------------------


@operation('F2FP.F16.F32.PACK_AB', 'u = f f')
def pack_halves(modifiers, high, low):
    return float_to_half(high) << U32(16) | float_to_half(low)


@operation('F2FP.BF16.F32.PACK_AB', 'u = f f')
def pack_bfloats(modifiers, high, low):
    return float_to_bfloat(high) << U32(16) | float_to_bfloat(low)


@operation('F2F.F16.F32', 'u = f')
def to_half(modifiers, a):
    return float_to_half(a)


@operation('F2F.BF16.F32', 'u = f')
def to_bfloat(modifiers, a):
    return float_to_bfloat(a)


@operation('I2F', 'f = i', 'RP')
@operation('I2FP.F32.S32', 'f = i')
def from_signed(modifiers, a):
    return integer_to_float(a, 'RP' in modifiers)


@operation('I2F.U32', 'f = u', 'RP')
@operation('I2FP.F32.U32', 'f = u')
def from_unsigned(modifiers, a):
    return integer_to_float(a, 'RP' in modifiers)


@operation('I2F.U64', 'f = w', 'RP')
def from_unsigned_wide(modifiers, a):
    return integer_to_float(a, 'RP' in modifiers)


@operation('I2F.S64', 'f = w', 'RP')
def from_signed_wide(modifiers, a):
    return integer_to_float(a.view(I64), 'RP' in modifiers)


@operation('F2I.TRUNC', 'u = f', 'FTZ NTZ U32')
def to_integer(modifiers, a):
    nan = 0 if modifiers & {'NTZ', 'U32'} else -(1 << 31)
    return float_to_integer(*flushed(modifiers, a), 32, 'U32' not in modifiers, nan)


@operation('F2I.TRUNC.S64', 'w = f', 'FTZ NTZ')
def to_signed_wide(modifiers, a):
    return float_to_integer(*flushed(modifiers, a), 64, True, 0 if 'NTZ' in modifiers else -(1 << 63))


@operation('F2I.TRUNC.U64', 'w = f', 'FTZ NTZ')
def to_unsigned_wide(modifiers, a):
    return float_to_integer(*flushed(modifiers, a), 64, False, 0 if 'NTZ' in modifiers else 1 << 63)
