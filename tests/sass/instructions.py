# SPDX-License-Identifier: Apache-2.0
"""Instructions that see more than the operands of their own lane: memory, other lanes, special registers, matrices.

Each entry of the table takes an instruction and returns what executes it. `decode` looks here first, then in the table
of operations; an instruction that neither knows raises an error that names it.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import bfloat_to_float, half_to_float
from .decoding import Execute, Mask, Read, bind, put, reader, writer
from .disassembly import Instruction, Operand, UnknownInstruction
from .memory import POISON_WORD

if TYPE_CHECKING:
    from .machine import Warps

U32, I64 = np.uint32, np.int64
LANES = np.arange(32)
Decode = Callable[[Instruction], Execute]

INSTRUCTIONS: dict[str, tuple[Decode, frozenset[str]]] = {}


def instruction(names: str, understood: str = '') -> Callable[[Decode], Decode]:
    """Enter what decodes the instructions of some names; it is given none with another modifier."""

    def enter(decode: Decode) -> Decode:
        for name in names.split():
            INSTRUCTIONS[name] = decode, frozenset(understood.split())
        return decode

    return enter


def decode(instruction: Instruction) -> Execute:
    """What executes an instruction that is none of control flow."""
    entry = INSTRUCTIONS.get(instruction.name)
    try:
        if entry is not None and entry[1].issuperset(instruction.modifiers):
            return entry[0](instruction)
        execute = bind(instruction)
    except (UnknownInstruction, LookupError, ValueError) as error:
        raise UnknownInstruction(f'{instruction}: {error}') from error
    if execute is None:
        raise UnknownInstruction(str(instruction))
    return execute


def form(instruction: Instruction, *kinds: str) -> tuple[Operand, ...]:
    """The operands, which must be of these kinds."""
    if [operand.kind for operand in instruction.operands] != list(kinds):
        raise UnknownInstruction(f'operands other than {kinds}')
    return instruction.operands


# ---- special registers and constants ---------------------------------------------------------------------------------


@instruction('NOP YIELD MEMBAR FENCE DEPBAR WARPGROUP', 'ALL CTA GPU SC VIEW ASYNC S LE ARRIVE DEPBAR')
def nothing(instruction: Instruction) -> Execute:
    """What orders accesses, or waits for them or for products: here they are done in order and at once."""
    return lambda warps, mask: None


@instruction('S2R S2UR')
def special_register(instruction: Instruction) -> Execute:
    target, source = form(instruction, 'register', 'name')
    write = writer(target, 'u')
    return lambda warps, mask: write(warps, warps.special(source.text), mask)


@instruction('CS2R')
def clear_pair(instruction: Instruction) -> Execute:
    target, source = form(instruction, 'register', 'name')
    if source.text != 'SRZ':
        raise UnknownInstruction(f'a source {source.text}')
    write = writer(target, 'w')
    return lambda warps, mask: write(warps, np.zeros((), np.uint64), mask)


@instruction('LDC ULDC', '64')
def load_constant(instruction: Instruction) -> Execute:
    target, source = form(instruction, 'register', 'constant')
    letter = 'w' if '64' in instruction.modifiers else 'u'
    read, write = reader(source, letter), writer(target, letter)
    return lambda warps, mask: write(warps, read(warps), mask)


# ---- predicates as bits, and other lanes -----------------------------------------------------------------------------


@instruction('P2R UP2UR')
def predicates_to_register(instruction: Instruction) -> Execute:
    target, file, source, bits = form(instruction, 'register', 'name', 'register', 'integer')
    if file.text != ('UPR' if target.uniform else 'PR'):
        raise UnknownInstruction(f'a source {file.text}')
    read, write, keep = reader(source, 'u'), writer(target, 'u'), U32(~bits.value & 0xFFFFFFFF)
    numbers = [i for i in range(7) if bits.value >> i & 1]

    def execute(warps: 'Warps', mask: Mask) -> None:
        predicates = warps.uniform_predicates if target.uniform else warps.predicates
        result = read(warps) & keep
        for i in numbers:
            result = result | predicates[i].astype(U32) << U32(i)
        write(warps, result, mask)

    return execute


@instruction('R2P')
def register_to_predicates(instruction: Instruction) -> Execute:
    _, source, bits = form(instruction, 'name', 'register', 'integer')
    read = reader(source, 'u')

    def execute(warps: 'Warps', mask: Mask) -> None:
        value = read(warps)
        for i in range(7):
            if bits.value >> i & 1:
                put(warps.predicates[i], (value >> U32(i) & U32(1)) != 0, mask)

    return execute


@instruction('R2UR')
def register_to_uniform(instruction: Instruction) -> Execute:
    target, source = form(instruction, 'register', 'register')
    read, write = reader(source, 'u'), writer(target, 'u')

    def execute(warps: 'Warps', mask: Mask) -> None:
        active = warps.lanes(mask)
        value = np.broadcast_to(read(warps), active.shape)
        first = np.take_along_axis(value, active.argmax(1)[:, None], 1)
        warps.fault('a register for the whole warp differs between lanes', instruction, active & (value != first))
        write(warps, first, mask)

    return execute


@instruction('VOTE VOTEU', 'ANY ALL')
def vote(instruction: Instruction) -> Execute:
    target, source = form(instruction, 'predicate', 'predicate')
    read, write = reader(source, 'p'), writer(target, 'p')
    any_of = 'ANY' in instruction.modifiers

    def execute(warps: 'Warps', mask: Mask) -> None:
        active = warps.lanes(mask)
        voices = np.broadcast_to(read(warps), active.shape)
        result = (voices & active).any(1) if any_of else (voices | ~active).all(1)
        write(warps, result[:, None], mask)

    return execute


def source_lanes(how: str, distance: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads in a shuffle, and whether it is one of its segment."""
    clamp, segment = bounds & 31, bounds >> 8 & 31
    last, first = (LANES & segment) | (clamp & ~segment), LANES & segment
    distance = distance & 31
    if how == 'IDX':
        source = first | (distance & ~segment)
    else:
        source = dict(UP=LANES - distance, DOWN=LANES + distance, BFLY=LANES ^ distance)[how]
    inside = source >= last if how == 'UP' else source <= last
    return np.where(inside, source, LANES), inside


@instruction('SHFL', 'IDX UP DOWN BFLY')
def shuffle(instruction: Instruction) -> Execute:
    inside_, target, value_, distance_, bounds_ = instruction.operands
    write_inside, write = writer(inside_, 'p'), writer(target, 'u')
    value, distance, bounds = (reader(operand, 'u') for operand in (value_, distance_, bounds_))
    (how,) = instruction.modifiers

    def execute(warps: 'Warps', mask: Mask) -> None:
        active = warps.lanes(mask)
        source, inside = source_lanes(how, distance(warps).astype(I64), bounds(warps).astype(I64))
        result, heard = take(value(warps), source), take(active, source)
        silent = active & ~heard
        if silent.any():
            warps.fault('shuffle from a lane that takes no part', instruction, silent)
            result = np.where(silent, U32(POISON_WORD), result)
        write(warps, result, mask)
        write_inside(warps, inside, mask)

    return execute


def take(row: np.ndarray, source: np.ndarray) -> np.ndarray:
    """What each lane gets from its source, in every warp the same, (32,), or not, (warps, 32)."""
    row = np.broadcast_to(row, (len(row), 32))
    return row[:, source] if source.ndim == 1 else np.take_along_axis(row, source, 1)


# ---- memory ----------------------------------------------------------------------------------------------------------

SIZES = {'U16': 2, 'S16': 2, '64': 8, '128': 16}  # bytes by modifier
HINTS = 'E EF EL LU NA'  # of generic addresses and of caches


def address_reader(operand: Operand) -> Read:
    """What adds up an address: 64 bits of a pair of registers, or 32 bits."""
    wide = any(is_pair for _, _, is_pair in operand.bases)
    if operand.kind != 'memory' or (wide and len(operand.bases) > 1):
        raise UnknownInstruction(f'an address {operand.text}')

    def read(warps: 'Warps') -> np.ndarray:
        total = np.full((1, 1), operand.offset, I64)
        for uniform, index, is_pair in operand.bases:
            base = warps.pair(uniform, index) if is_pair else warps.file(uniform)[index]
            total = total + base.astype(I64)
        return total if wide else total & 0xFFFFFFFF

    return read


def size_of(instruction: Instruction) -> int:
    return next((size for modifier, size in SIZES.items() if modifier in instruction.modifiers), 4)


@instruction('LDG LDS LDL', f'U16 S16 64 128 CONSTANT {HINTS}')
def load(instruction: Instruction) -> Execute:
    target, place = form(instruction, 'register', 'memory')
    address, size, space = address_reader(place), size_of(instruction), instruction.name[-1]
    constant, signed = 'CONSTANT' in instruction.modifiers, 'S16' in instruction.modifiers
    text = str(instruction)

    def execute(warps: 'Warps', mask: Mask) -> None:
        active = warps.lanes(mask)
        memory, at = warps.locate(space, address(warps), active)
        words = memory.load(at, size, warps.access(active, text, constant))
        if signed:
            words = words.astype(np.int16).astype(np.int32).view(U32)
        if target.index != 255:
            for i, word in enumerate(words):
                warps.registers[target.index + i][active] = word

    return execute


@instruction('STG STS STL', f'U16 S16 64 128 {HINTS}')
def store(instruction: Instruction) -> Execute:
    place, source = form(instruction, 'memory', 'register')
    address, size, space = address_reader(place), size_of(instruction), instruction.name[-1]
    rows = [source.index + i if source.index != 255 else 255 for i in range(max(size // 4, 1))]
    text = str(instruction)

    def execute(warps: 'Warps', mask: Mask) -> None:
        active = warps.lanes(mask)
        memory, at = warps.locate(space, address(warps), active)
        values = np.stack([warps.registers[row][active] for row in rows])
        memory.store(at, values, size, warps.access(active, text))
        if space == 'L' and size == 2:  # a half is put aside, and read with the other, poison, which nothing then uses
            memory.initialised[at[at >= 0] >> 1 | 1] = True

    return execute


# ---- matrices --------------------------------------------------------------------------------------------------------
# A warp holds a matrix of 16-bit numbers in pieces of 8x8: lane 4 r + c has numbers 2c and 2c + 1 of row r in one
# register. Of a product's 16x8 result in float32 it has those two of row r, then those two of row r + 8.


def whole_warps(warps: 'Warps', mask: Mask, instruction: Instruction) -> np.ndarray:
    """Which warps take part, of whose lanes none may be missing."""
    active = warps.lanes(mask)
    warps.fault('a lane takes no part in what needs all', instruction, active.any(1, keepdims=True) & ~active)
    return active.all(1)


def pieces(instruction: Instruction) -> tuple[int, bool]:
    """How many pieces an instruction moves, and whether it turns them."""
    modifiers = set(instruction.modifiers)
    turned = 'MT88' in modifiers
    if '16' not in modifiers or not modifiers & {'M88', 'MT88'}:
        raise UnknownInstruction('matrices of another shape')
    return next((int(count) for count in '24' if count in modifiers), 1), turned


def matrix_halves(place: Operand, instruction: Instruction) -> Callable:
    """What finds the active lanes and, for both numbers of the register of each piece, the memory and the addresses.

    Lanes 8 i to 8 i + 7 say where the rows of piece i begin.
    """
    count, turned = pieces(instruction)
    address = address_reader(place)
    row, column = LANES // 4, 2 * (LANES % 4)

    def find(warps: 'Warps', mask: Mask) -> tuple[np.ndarray, list]:
        part = whole_warps(warps, mask, instruction)
        active = np.broadcast_to(part[:, None], (len(part), 32))
        rows = np.broadcast_to(address(warps), active.shape)[:, : 8 * count].reshape(-1, count, 8)
        places = [(column + j, row) if turned else (row, column + j) for j in range(2)]
        return active, [
            [warps.locate('S', rows[:, i, from_row] + 2 * at, active) for from_row, at in places] for i in range(count)
        ]

    return find


@instruction('LDSM', '16 M88 MT88 2 4')
def load_matrix(instruction: Instruction) -> Execute:
    target, place = form(instruction, 'register', 'memory')
    find = matrix_halves(place, instruction)
    text = str(instruction)

    def execute(warps: 'Warps', mask: Mask) -> None:
        active, registers = find(warps, mask)
        access = warps.access(active, text)
        for i, halves in enumerate(registers):
            low, high = (memory.load(at, 2, access)[0] for memory, at in halves)
            warps.registers[target.index + i][active] = low | high << U32(16)

    return execute


@instruction('STSM', '16 M88 MT88 2 4')
def store_matrix(instruction: Instruction) -> Execute:
    place, source = form(instruction, 'memory', 'register')
    find = matrix_halves(place, instruction)
    text = str(instruction)

    def execute(warps: 'Warps', mask: Mask) -> None:
        active, registers = find(warps, mask)
        access = warps.access(active, text)
        for i, halves in enumerate(registers):
            word = warps.registers[source.index + i][active]
            for j, (memory, at) in enumerate(halves):
                memory.store(at, (word >> U32(16 * j) & U32(0xFFFF))[None], 2, access)

    return execute


def halves_of(registers: np.ndarray, first: int, count: int, to_float: Callable) -> np.ndarray:
    """Numbers of 8x8 pieces in so many registers, as float64: (count, warps, 8, 8)."""
    words = registers[first : first + count]  # [count, warps, 32]
    both = np.stack([to_float(words), to_float(words >> U32(16))], -1)
    return both.reshape(*words.shape[:2], 8, 8).astype(np.float64)


def tf32(registers: np.ndarray, first: int, count: int) -> np.ndarray:
    """Numbers of 8x4 pieces, one in each lane, without the bits that a product drops: (count, warps, 8, 4)."""
    words = registers[first : first + count] & U32(0xFFFFE000)
    return words.view(np.float32).reshape(count, -1, 8, 4).astype(np.float64)


def rows_of(registers: np.ndarray, first: int, to_float: Callable | None) -> np.ndarray:
    """The left matrix of a product from four registers, upper and lower pieces first: (warps, 16, k)."""
    left = halves_of(registers, first, 4, to_float) if to_float else tf32(registers, first, 4)
    return np.concatenate([np.concatenate(left[[0, 2]], -1), np.concatenate(left[[1, 3]], -1)], -2)


@instruction('HMMA', '16816 1688 F32 BF16 TF32')
def multiply_matrices(instruction: Instruction) -> Execute:
    """d = a b + c: exact products, added in float64 and rounded once, where the chip rounds each sum of a few."""
    operands = form(instruction, *['register'] * 4)
    d, a, b, c = (operand.index for operand in operands)
    shape, kind, *rest = instruction.modifiers
    if kind != 'F32' or rest not in {'16816': ([], ['BF16']), '1688': (['TF32'],)}[shape]:
        raise UnknownInstruction('matrices of another shape or type')
    to_float = bfloat_to_float if 'BF16' in rest else half_to_float

    def execute(warps: 'Warps', mask: Mask) -> None:
        part = whole_warps(warps, mask, instruction)
        R = warps.registers
        A = rows_of(R, a, None if shape == '1688' else to_float)
        right = tf32(R, b, 2) if shape == '1688' else halves_of(R, b, 2, to_float)
        B = np.concatenate(right, -1)  # [warps, 8 columns, k]
        multiply_rows(R, d, A, B, c, part)

    return execute


def multiply_rows(R: np.ndarray, d: int, A: np.ndarray, B: np.ndarray, c: int | None, part: np.ndarray) -> None:
    """d = A B + c in the registers of the warps that take part.

    Args:
        R: The registers.
        d: First register of the result, of which each 8 columns take four.
        A: Left matrices, (warps, 16, k).
        B: Right matrices, a row for each column of the result: (warps, columns, k).
        c: First register of what is added; None or RZ for nothing.
        part: Warps that take part.
    """
    lanes = np.broadcast_to(part[:, None], R.shape[1:])
    for n in range(0, B.shape[1], 8):
        result = A @ B[:, n : n + 8].swapaxes(1, 2)
        if c is not None and c != 255:
            before = R[c + n // 2 : c + n // 2 + 4].view(np.float32)
            result = result + np.concatenate([_join(before[:2]), _join(before[2:])], 1)  # [warps, 16, 8]
        result = result.astype(np.float32)
        for i in range(4):
            numbers = np.ascontiguousarray(result[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2])
            put(R[d + n // 2 + i], numbers.reshape(-1, 32).view(U32), lanes)


def _join(pair: np.ndarray) -> np.ndarray:
    """Two registers, (2, warps, 32), as the numbers of a piece, (warps, 8, 8)."""
    return np.stack(list(pair), -1).reshape(-1, 8, 8).astype(np.float64)


# ---- matrices in shared memory ---------------------------------------------------------------------------------------
# Four warps multiply 64 rows, each of them 16, by one matrix in shared memory, where descriptors in uniform registers
# tell how a matrix lies: in pieces of 16 bytes, as in tables with rows of 32, 64 or 128 bytes. Eight rows follow one
# another, the next eight are a stride further, and what is too long for a row is in another table. Bits of the row's
# number, from bit 7 of the address on, are added without carry to the number of the piece in its row.

WIDTHS = {3: 32, 2: 64, 1: 128}  # bytes of a row, by the last two bits of a descriptor
SHIFTS = (0, 16, 32)  # of where it begins, how far its next table is, and how far its next eight rows
DESCRIPTORS = re.compile(r'gdesc\[UR(\d+)\](\.tnspB)?$')
SHAPES = {f'64x{columns}x{k}': (columns, k) for columns in range(8, 257, 8) for k in (8, 16)}


def piece_addresses(descriptor: np.ndarray, row: np.ndarray, count: int, instruction: str) -> np.ndarray:
    """Where the first pieces of 16 bytes of some rows, (warps, rows), lie: (warps, rows, count)."""
    start, lead, stride = ((descriptor >> np.uint64(i) & np.uint64(0x3FFF)).astype(I64)[..., None] << 4 for i in SHIFTS)
    modes = np.unique(descriptor >> np.uint64(49)).tolist()
    width = WIDTHS.get(modes[0] >> 13)
    if len(modes) > 1 or width is None or modes[0] & 0x1FFF:  # tables that do not begin with a row 0; reserved bits
        raise UnknownInstruction(f'{instruction}: a matrix that lies in another way')
    row, byte = row[..., None], 16 * np.arange(count)
    address = start + row // 8 * stride + row % 8 * width + byte // width * lead + byte % width
    return address ^ (address >> 3 & width - 16)


def shared_matrix(register: int, instruction: Instruction) -> Callable:
    """What reads rows of so many pieces of a matrix with a descriptor, as words: (warps, rows, 4 count)."""
    text = str(instruction)

    def read(warps: 'Warps', part: np.ndarray, row: np.ndarray, count: int) -> np.ndarray:
        pieces = piece_addresses(warps.pair(True, register), row, count, text)
        rows, pieces = pieces.shape[1], pieces.reshape(len(part), -1)
        active = np.broadcast_to(part[:, None], (len(part), 32))
        access = warps.access(active, text)
        words = np.zeros((*pieces.shape, 4), U32)
        for first in range(0, pieces.shape[1], 32):  # as though each lane read one
            lanes = np.minimum(np.arange(first, first + 32), pieces.shape[1] - 1)
            memory, at = warps.locate('S', pieces[:, lanes], active)
            words[np.ix_(part, lanes)] = memory.load(at, 16, access).T.reshape(-1, 32, 4)
        return words.reshape(len(part), rows, -1)

    return read


@instruction('HGMMA', f'F32 TF32 BF16 {" ".join(SHAPES)}')
def multiply_shared(instruction: Instruction) -> Execute:
    """d = a b + d, or a b alone where a predicate says so; exact as in `multiply_matrices`.

    b is in shared memory, by rows for each column or, turned, for each k; a is too, or in registers. The chip computes
    while the warps go on, up to WARPGROUP.DEPBAR; here it is done at once.
    """
    d, *lefts, place, c = instruction.operands[: 4 if instruction.operands[1].kind == 'register' else 3]
    rest = [operand.text for operand in instruction.operands[3 + len(lefts) :]]
    shape, _, *kind = instruction.modifiers
    (columns, k), found, adds = SHAPES[shape], DESCRIPTORS.match(place.text), '!UPT' not in rest
    known = (d.kind, c.kind, c.index) == ('register', 'register', d.index if adds else 255)
    if not (found and known and rest in ([], ['gsb0'], ['!UPT'], ['!UPT', 'gsb0'])):
        raise UnknownInstruction('other operands')
    turned, first = bool(found[2]), int(found[1])
    if instruction.modifiers[1] != 'F32' or k != (8 if kind == ['TF32'] else 16) or (turned and k == 8):
        raise UnknownInstruction('matrices of another shape or type')
    to_float = None if k == 8 else bfloat_to_float if kind else half_to_float
    left, right = shared_matrix(first, instruction), shared_matrix(first + 2, instruction)

    def numbers(words: np.ndarray) -> np.ndarray:
        if to_float is None:
            return (words & U32(0xFFFFE000)).view(np.float32).astype(np.float64)
        both = np.stack([to_float(words), to_float(words >> U32(16))], -1)
        return both.reshape(*words.shape[:2], -1).astype(np.float64)

    def execute(warps: 'Warps', mask: Mask) -> None:
        part = whole_warps(warps, mask, instruction)
        if turned:
            B = numbers(right(warps, part, np.arange(16)[None], columns // 8)).swapaxes(1, 2)
        else:
            B = numbers(right(warps, part, np.arange(columns)[None], 2))
        if lefts:
            A = rows_of(warps.registers, lefts[0].index, to_float)
        else:
            A = numbers(left(warps, part, 16 * (warps.warp % 4) + np.arange(16), 2))
        multiply_rows(warps.registers, d.index, A, B, d.index if adds else None, part)

    return execute
