# SPDX-License-Identifier: Apache-2.0
"""From instructions to functions: what reads the operands, computes and writes, put together once for every run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import float_to_bfloat, float_to_half
from .disassembly import Instruction, Operand, UnknownInstruction
from .operations import Operation, find_operation

if TYPE_CHECKING:
    from .machine import Warps

Mask = np.ndarray | None  # lanes that take part, (warps, 32) or (warps, 1); None stands for all
Execute = Callable[['Warps', Mask], None]
Read = Callable[['Warps'], np.ndarray]
Write = Callable[['Warps', np.ndarray, Mask], None]

U32, U64 = np.uint32, np.uint64


# ---- operands --------------------------------------------------------------------------------------------------------


def reader(operand: Operand, letter: str) -> Read:
    """What reads an operand of a kind that `operations` gives a letter: an array that fits (warps, 32)."""
    if letter == 'p':
        return _predicate_reader(operand)
    if letter == 'w':
        return _wide_reader(operand)
    if operand.kind == 'integer':
        return _always(_as(letter)(np.asarray(operand.value & 0xFFFFFFFF, U32)))
    if operand.kind == 'float' and letter == 'f':
        return _always(np.asarray(operand.value, np.float32))
    if operand.kind == 'register':
        return _register_reader(operand, letter)
    if operand.kind == 'constant':
        bank, offset = operand.value
        view = _as(letter)
        return lambda warps: view(warps.constant(bank, offset, operand.sign))
    raise UnknownInstruction(f'an operand {operand.text}')


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'c': lambda bits: bits.astype(U64),
    'f': lambda bits: bits.view(np.float32),
    'i': lambda bits: bits.view(np.int32),
}


def _as(letter: str) -> Callable[[np.ndarray], np.ndarray]:
    return VIEWS.get(letter, lambda bits: bits)


def _always(value: Any) -> Read:
    return lambda warps: value


def _register_reader(operand: Operand, letter: str) -> Read:
    index, uniform, sign, view = operand.index, operand.uniform, operand.sign, _as(letter)

    def read(warps: 'Warps') -> np.ndarray:
        return (warps.uniform if uniform else warps.registers)[index]

    if letter == 'h':
        return _half_reader(operand, read)
    if letter == 'f':
        if operand.absolute:
            return (lambda w: -np.abs(view(read(w)))) if sign else (lambda w: np.abs(view(read(w))))
        return (lambda w: -view(read(w))) if sign else (lambda w: view(read(w)))
    if operand.absolute or operand.half:
        raise UnknownInstruction(f'an operand {operand.text}')
    if letter == 'c' and sign == '-':
        return lambda w: (~read(w)).astype(U64) + U64(1)
    if sign == '-':
        return lambda w: view(U32(0) - read(w))
    return (lambda w: view(~read(w))) if sign == '~' else (lambda w: view(read(w)))


def _half_reader(operand: Operand, read: Read) -> Read:
    shift = U32(16 if operand.half == 'H1_H1' else 0)
    flip = U32(0x80008000 if operand.sign else 0)
    keep = U32(0x7FFF7FFF if operand.absolute else 0xFFFFFFFF)

    def read_halves(warps: 'Warps') -> np.ndarray:
        bits = read(warps)
        if operand.half:
            bits = (bits >> shift & U32(0xFFFF)) * U32(0x10001)
        return bits & keep ^ flip

    return read_halves


def _wide_reader(operand: Operand) -> Read:
    if operand.kind == 'integer':
        return _always(np.asarray(operand.value % (1 << 64), U64))
    if operand.kind == 'constant' and not operand.sign:
        bank, offset = operand.value
        return lambda w: w.constant(bank, offset).astype(U64) | w.constant(bank, offset + 4).astype(U64) << U64(32)
    if operand.kind != 'register' or operand.sign == '~' or operand.absolute:
        raise UnknownInstruction(f'an operand {operand.text}')

    def read(warps: 'Warps') -> np.ndarray:
        value = warps.pair(operand.uniform, operand.index)
        return U64(0) - value if operand.sign else value

    return read


def _predicate_reader(operand: Operand) -> Read:
    if operand.kind != 'predicate':
        raise UnknownInstruction(f'an operand {operand.text}')
    index, uniform = operand.index, operand.uniform
    if operand.sign:
        return lambda w: ~(w.uniform_predicates if uniform else w.predicates)[index]
    return lambda w: (w.uniform_predicates if uniform else w.predicates)[index]


def writer(operand: Operand, letter: str) -> Write:
    """What writes a result, as a kind that `operations` gives a letter, in the lanes that take part."""
    index, uniform, kind = operand.index, operand.uniform, operand.kind
    if kind != ('predicate' if letter == 'p' else 'register') or operand.sign:
        raise UnknownInstruction(f'an operand {operand.text}')
    if letter == 'p':
        if index == 7:
            return lambda warps, value, mask: None
        return lambda w, value, mask: put((w.uniform_predicates if uniform else w.predicates)[index], value, mask)
    if index == (63 if uniform else 255):
        return lambda warps, value, mask: None
    if letter == 'f':
        return lambda w, value, mask: put(w.file(uniform)[index], value.view(U32), mask)
    if letter == 'w':

        def write_pair(w: 'Warps', value: np.ndarray, mask: Mask) -> None:
            value = np.asarray(value).view(U64)
            put(w.file(uniform)[index], value & U64(0xFFFFFFFF), mask)
            put(w.file(uniform)[index + 1], value >> U64(32), mask)

        return write_pair
    return lambda w, value, mask: put(w.file(uniform)[index], value, mask)


def put(row: np.ndarray, value: np.ndarray, mask: Mask) -> None:
    """row = value, in the lanes that take part; a row of a number for each warp takes it where any lane does."""
    if mask is None:
        np.copyto(row, value, casting='unsafe')
    else:
        if row.shape[1] < mask.shape[1]:
            mask = mask.any(1, keepdims=True)
        np.copyto(row, value, casting='unsafe', where=mask)


# ---- instructions ----------------------------------------------------------------------------------------------------


def bind(instruction: Instruction) -> Execute | None:
    """What executes an instruction of the table of operations; None if that does not know it."""
    entry = find_operation(instruction.name, instruction.modifiers)
    if entry is None:
        return None
    operands = list(instruction.operands)
    writers = [_take(operands, letter, writer) for letter in entry.outputs]
    readers = [_input(operands, letter, instruction) for letter in entry.inputs]
    if operands:
        raise UnknownInstruction(f'operands {operands}')
    return _execute(entry, frozenset(instruction.modifiers), writers, readers)


def _take(operands: list[Operand], letter: str, make: Callable) -> Callable | None:
    """Take the next operand, or none where it may be absent and the next is something else."""
    if letter.endswith('?') and not (operands and operands[0].kind == 'predicate'):
        return None
    if not operands:
        raise UnknownInstruction('too few operands')
    return make(operands.pop(0), letter[0])


def _input(operands: list[Operand], letter: str, instruction: Instruction) -> Read:
    if letter == 'n':
        return _always(operands.pop(0).value)
    if letter == 'h' and operands[0].kind == 'float':  # both halves stand there, the upper first
        encode = float_to_bfloat if 'BF16_V2' in instruction.modifiers else float_to_half
        high, low = (encode(np.asarray(operands.pop(0).value, np.float32)) for _ in range(2))
        return _always(np.asarray(high << 16 | low, U32))
    return _take(operands, letter, reader) or _always(None)


def _execute(entry: Operation, modifiers: frozenset[str], writers: list, readers: list) -> Execute:
    compute = entry.compute
    if len(writers) == 1:
        (write,) = writers

        def execute(warps: 'Warps', mask: Mask) -> None:
            write(warps, compute(modifiers, *[read(warps) for read in readers]), mask)

        return execute

    def execute_several(warps: 'Warps', mask: Mask) -> None:
        results = compute(modifiers, *[read(warps) for read in readers])
        for write, value in zip(writers, results, strict=True):
            if write is not None:
                write(warps, value, mask)

    return execute_several
