# SPDX-License-Identifier: Apache-2.0
"""Machine code as cuobjdump prints it, taken apart: instructions, operands, and where a kernel's parameters lie."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

INSTRUCTION_BYTES = 16
PRINTED = re.compile(
    r'^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/\s*\n\s+/\* 0x([0-9a-f]{16}) \*/', re.M
)
GUARD = re.compile(r'@(!?U?P[T\d]+)\s+')
REGISTER = re.compile(r'([-~]?)(\|?)(U?R)(\d+|Z)(?:\.(H0_H0|H1_H1))?\|?(?:\.(H0_H0|H1_H1))?$')
PREDICATE = re.compile(r'(!?)(U?P)(\d|T)$')
CONSTANT = re.compile(r'(-?)c\[(0x[0-9a-f]+)\]\[(0x[0-9a-f]+)\]$')
INTEGER = re.compile(r'-?0x[0-9a-f]+$')
FLOAT = re.compile(r'[-+]?(\d[\d.]*(e[-+]?\d+)?|INF|[QS]?NAN)$')
MEMORY = re.compile(r'(?:desc\[UR\d+\])?\[(.*)\]$')
BASE = re.compile(r'(U?R)(\d+|Z)(\.64)?$')


class UnknownInstruction(Exception):
    """An instruction, or a form of one, of which the emulator does not know what it does."""


@dataclass(frozen=True)
class Operand:
    """One operand of an instruction.

    Args:
        text: What cuobjdump printed.
        kind: 'register', 'predicate', 'constant', 'integer', 'float', 'memory' or 'name'.
        uniform: Whether the register or predicate is one for a whole warp.
        index: Number of the register or predicate; RZ, URZ, PT and UPT, which are constant, are the last of their file.
        sign: '-' or '~' before a register or constant, '!' before a predicate.
        absolute: Whether it is the absolute value that is meant.
        half: Half of the register that is meant, 'H0_H0' or 'H1_H1'.
        value: The number of an immediate, or the place of a constant, (bank, offset).
        bases: Registers that an address adds up, as (uniform, index, whether it is a pair).
        offset: Bytes that it adds.
    """

    text: str
    kind: str
    uniform: bool = False
    index: int = 0
    sign: str = ''
    absolute: bool = False
    half: str = ''
    value: int | float | tuple[int, int] = 0
    bases: tuple[tuple[bool, int, bool], ...] = ()
    offset: int = 0


LAST = {'R': 255, 'UR': 63, 'P': 7, 'UP': 7}


def _number(file: str, digits: str) -> int:
    return int(digits) if digits.isdigit() else LAST[file]


def parse_operand(text: str) -> Operand:
    if match := REGISTER.match(text):
        sign, bar, file, digits, inner, outer = match.groups()
        number = _number(file, digits)
        return Operand(text, 'register', file == 'UR', number, sign, bool(bar), inner or outer or '')
    if match := PREDICATE.match(text):
        sign, file, digits = match.groups()
        return Operand(text, 'predicate', file == 'UP', _number(file, digits), sign)
    if match := CONSTANT.match(text):
        return Operand(text, 'constant', sign=match[1], value=(int(match[2], 16), int(match[3], 16)))
    if INTEGER.match(text):
        return Operand(text, 'integer', value=int(text, 16))
    if FLOAT.match(text):
        return Operand(text, 'float', value=float(re.sub('[QS]NAN', 'NAN', text)))
    if match := MEMORY.match(text):
        bases, offset = [], 0
        for term in match[1].split('+'):
            if INTEGER.match(term):
                offset += int(term, 16)
            elif base := BASE.match(term):
                bases.append((base[1] == 'UR', _number(base[1], base[2]), bool(base[3])))
            else:
                return Operand(text, 'name')
        return Operand(text, 'memory', bases=tuple(bases), offset=offset)
    return Operand(text, 'name')


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        address: Bytes from the beginning of the kernel.
        text: What cuobjdump printed.
        encoding: The 128 bits of the instruction, among them what the scheduler of the chip is told.
    """

    address: int
    text: str
    encoding: int = 0

    @cached_property
    def guard(self) -> Operand | None:
        match = GUARD.match(self.text)
        return parse_operand(match[1]) if match else None

    @cached_property
    def opcode(self) -> str:
        return GUARD.sub('', self.text).split()[0]

    @property
    def name(self) -> str:
        return self.opcode.split('.')[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split('.')[1:])

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        _, _, rest = GUARD.sub('', self.text).replace('.reuse', '').partition(' ')
        return tuple(parse_operand(part.strip()) for part in rest.split(',')) if rest.strip() else ()

    def __str__(self) -> str:
        return f'{self.address:#06x} {self.text}'


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled kernel.

    Args:
        name: Name of the kernel.
        instructions: Its machine code, in the order of addresses.
        parameters: Place and size in bytes of every parameter, in constant bank 0.
        registers: Registers that a thread takes.
        stack: Bytes of local memory that a thread takes.
    """

    name: str
    instructions: tuple[Instruction, ...]
    parameters: tuple[tuple[int, int], ...] = ()
    registers: int = 255
    stack: int = 0


def assemble(text: str) -> tuple[Instruction, ...]:
    """Instructions written by hand, one a line, each 16 bytes after the one before; what follows // is left out."""
    lines = [line.partition('//')[0].strip().rstrip(' ;') for line in text.splitlines()]
    return tuple(Instruction(INSTRUCTION_BYTES * i, line) for i, line in enumerate(filter(None, lines)))


def dump(cubin: bytes) -> str:
    """What cuobjdump, which Triton's wheel brings, prints of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'kernel.cubin'
        file.write_bytes(cubin)
        command = [tool, '-sass', '-elf', '-res-usage', file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_kernel(text: str) -> Kernel:
    """Take apart what `dump` returns of a cubin of one kernel."""
    instructions = tuple(
        Instruction(int(address, 16), source, int(high, 16) << 64 | int(low, 16))
        for address, source, low, high in PRINTED.findall(text)
    )
    assert [i.address for i in instructions] == [INSTRUCTION_BYTES * n for n in range(len(instructions))], 'cuobjdump'
    (name,) = re.findall(r'^\s*Function : (\S+)', text, re.M)
    (base,) = re.findall(r'EIATTR_PARAM_CBANK\s+Format:\s+\S+\s+Value:\s+\S+ (0x[0-9a-f]+)', text)
    found = re.findall(r'Ordinal\s*: (0x[0-9a-f]+)\s+Offset\s*: (0x[0-9a-f]+)\s+Size\s*: (0x[0-9a-f]+)', text)
    parameters = sorted(tuple(int(number, 16) for number in row) for row in found)  # by ordinal
    start = int(base, 16) & 0xFFFF  # above it stands the size of all
    ((registers, stack),) = re.findall(r'REG:(\d+) STACK:(\d+)', text)
    return Kernel(
        name,
        instructions,
        tuple((start + offset, size) for _, offset, size in parameters),
        int(registers),
        int(stack),
    )
