# SPDX-License-Identifier: Apache-2.0
"""The machine: registers of warps, and what runs them.

All warps of several programs keep step, so that an instruction is a few operations on arrays (warps, 32). Where threads
part, those that are behind in the code go on first, and all go on together where they meet. By `order`, warps can
instead run one after another, each as far as the next barrier: what is then computed otherwise hangs on the order.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .decoding import Execute, Mask, Read, reader
from .disassembly import INSTRUCTION_BYTES, Instruction, Kernel, UnknownInstruction
from .instructions import decode
from .memory import POISON_WORD, Access, Fault, Memory, tags

U32, I64 = np.uint32, np.int64
SHARED_BASE = 0x400  # the chip keeps what is below
STACK_TOP = 0x100000
STACK_POINTER = (0, 0x28)  # its place among the constants
MOST_BRANCHES = 1_000_000  # and joins and barriers, before a program is said to have no end
CONTROL = {'BRA', 'EXIT', 'BAR', 'BSSY', 'BSYNC', 'BREAK', 'WARPSYNC', 'CALL', 'RET'}


class Deadlock(Exception):
    """Threads wait for others that never come."""


@dataclass(frozen=True)
class Step:
    """An instruction, decoded: what its guard reads, and what it executes, or else its kind of control flow."""

    instruction: Instruction
    guard: Read | None
    execute: Execute | None
    control: str = ''
    target: int = 0  # index of another instruction
    predicate: Read | None = None  # a second guard, of branches
    barrier: int = 0


def decode_step(instruction: Instruction) -> Step:
    guard = reader(instruction.guard, 'p') if instruction.guard else None
    name = instruction.name
    if name not in CONTROL:
        return Step(instruction, guard, decode(instruction))
    known, operands = CONTROL_FORMS[name], list(instruction.operands)
    if instruction.modifiers not in known:
        raise UnknownInstruction(str(instruction))
    predicate = reader(operands.pop(0), 'p') if operands and operands[0].kind == 'predicate' else None
    barrier = int(operands.pop(0).text[1:]) if name in ('BSSY', 'BSYNC', 'BREAK') else 0
    target = 0
    if name in ('BRA', 'CALL', 'BSSY'):
        target = operands.pop(0).value // INSTRUCTION_BYTES
    elif name == 'RET':  # its one operand is the register, then what is added to it
        register, offset = operands.pop(0).text.split()
        target = int(register[1:])
        if int(offset, 16) != 0:
            raise UnknownInstruction(str(instruction))
    elif name == 'BAR' and operands.pop(0).value != 0:
        raise UnknownInstruction(str(instruction))
    if operands:
        raise UnknownInstruction(str(instruction))
    return Step(instruction, guard, None, name, target, predicate, barrier)


CONTROL_FORMS: dict[str, set[tuple[str, ...]]] = {
    'BRA': {(), ('U',)},
    'EXIT': {()},
    'BAR': {('SYNC', 'DEFER_BLOCKING'), ('SYNC',)},
    'BSSY': {()},
    'BSYNC': {()},
    'BREAK': {()},
    'WARPSYNC': {('ALL',)},
    'CALL': {('REL', 'NOINC')},
    'RET': {('REL', 'NODEC')},
}


@dataclass
class Launch:
    """A kernel that runs over a grid: what its programs share, and what is found.

    Args:
        kernel: The kernel.
        grid: Programs along each axis.
        warps: Warps of a program.
        shared: Bytes of shared memory of a program.
        memory: Global memory.
        base: Address at which it begins.
        constants: Words of the constant banks, by bank and offset.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    warps: int
    shared: int
    memory: Memory
    base: int
    constants: dict[tuple[int, int], int]
    faults: Counter[Fault] = field(default_factory=Counter)
    barriers: int = 0  # that the program with most has passed
    skipped: int | None = None  # an instruction that is left out
    traces_barriers: bool = False  # notes which barriers are needed
    order: Sequence[int] | None = None  # rank of each warp of a program, by which they run one after another

    def __post_init__(self) -> None:
        self.memory.faults = self.faults
        self.shared_needs: set[int] = set()
        self.before = self.memory.units.copy(), self.memory.initialised.copy()
        self.steps = decode_kernel(self.kernel)
        self.issued = np.zeros(len(self.steps), I64)  # warps that issued each instruction

    @property
    def programs(self) -> int:
        return int(np.prod(self.grid))

    def counts(self) -> Counter[str]:
        """How often a warp issued each opcode, in all programs."""
        counts: Counter[str] = Counter()
        for instruction, issued in zip(self.kernel.instructions, self.issued, strict=True):
            counts[instruction.opcode] += int(issued)
        return +counts

    @property
    def needed_barriers(self) -> set[int]:
        """Barriers, by index, without which two warps would race: those that were found, if barriers are traced."""
        return (self.memory.needed | self.shared_needs) - {-1, -2}

    def again(
        self, skipped: int | None = None, order: Sequence[int] | None = None, traces_barriers: bool = False
    ) -> 'Launch':
        """The same launch once more, from the same memory: without an instruction, or with warps in another order."""
        memory = Memory(self.memory.size, self.memory.name_of)
        memory.units[:], memory.initialised[:] = self.before
        memory.allocated[:] = self.memory.allocated
        options = dict(skipped=skipped, order=order, traces_barriers=traces_barriers)
        launch = dataclasses.replace(self, memory=memory, faults=Counter(), barriers=0, **options)
        launch.run()
        return launch

    def run(self, at_once: int = 128) -> None:
        """Run all programs, so many warps at once."""
        count = max(1, at_once // self.warps)
        with np.errstate(all='ignore'):
            for first in range(0, self.programs, count):
                Warps(self, np.arange(first, min(first + count, self.programs))).run()


@functools.lru_cache(maxsize=16)
def decode_kernel(kernel: Kernel) -> list[Step]:
    return [decode_step(instruction) for instruction in kernel.instructions]


class Warps:
    """The warps of some programs: their registers, and where each thread is.

    `observe`, if there is one, is told of every instruction before it is executed: its index, the threads that come to
    it, (warps, 32), and the lanes that take part, if not all.
    """

    observe: Callable[[int, np.ndarray, Mask], None] | None = None

    def __init__(self, launch: Launch, programs: np.ndarray) -> None:
        count, warps = len(programs), launch.warps
        total = count * warps
        self.launch = launch
        self.slot = np.repeat(np.arange(count), warps)[:, None]  # of the program among these, [warps, 1]
        self.program = programs[self.slot]
        self.warp = np.tile(np.arange(warps), count)[:, None]
        self.none = np.zeros((total, 1), I64)
        self.epoch = self.none.copy()  # barriers that the program has passed
        self.barrier, self.since = self.none - 1, self.none.copy()  # the last of them, and the epoch before its row
        self.registers = np.full((256, total, 32), POISON_WORD, U32)
        self.uniform = np.full((64, total, 1), POISON_WORD, U32)
        self.registers[255], self.uniform[63] = 0, 0
        self.predicates = np.zeros((8, total, 32), bool)
        self.uniform_predicates = np.zeros((8, total, 1), bool)
        self.predicates[7], self.uniform_predicates[7] = True, True
        self.shared = Memory(count * launch.shared, lambda address: 'shared memory', launch.faults, launch.shared_needs)
        self.shared.allocated[: count * launch.shared // 2] = True
        self.stack = launch.kernel.stack
        self.local = Memory(total * 32 * self.stack, lambda address: 'local memory', launch.faults)
        self.local.allocated[: total * 32 * self.stack // 2] = True

        self.everyone, self.no_number = np.ones((total, 32), bool), np.zeros((total, 32), I64)
        self.alive = self.everyone.copy()
        self.at_barrier = np.zeros((total, 32), bool)
        self.resume = np.zeros((total, 32), I64)  # where those go on that wait
        self.joining = np.full((total, 32), -1, I64)  # the convergence barrier at which a thread waits
        self.party = np.zeros((16, total, 32), U32)  # lanes that meet at each of them, as bits
        order = np.zeros(warps, int) if launch.order is None else np.asarray(launch.order)
        self.rank = np.tile(order, count)[:, None]
        self.groups: dict[tuple[int, int], np.ndarray] = {}  # threads that can go on, by rank and instruction

    # ---- what instructions use ---------------------------------------------------------------------------------------

    def file(self, uniform: bool) -> np.ndarray:
        return self.uniform if uniform else self.registers

    def pair(self, uniform: bool, index: int) -> np.ndarray:
        """Two registers as one number of 64 bits; that after the last, which is zero, is zero too."""
        file = self.file(uniform)
        high = file[min(index + 1, len(file) - 1)]
        return file[index].astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def constant(self, bank: int, offset: int, sign: str = '') -> np.ndarray:
        value = self.launch.constants.get((bank, offset))
        if value is None:
            raise UnknownInstruction(f'the constant c[{bank:#x}][{offset:#x}] is unknown')
        return np.asarray(-value & 0xFFFFFFFF if sign else value, U32)

    def special(self, name: str) -> np.ndarray:
        """The special register of a name."""
        x, y, _ = self.launch.grid
        values = {
            'SR_TID.X': lambda: self.warp * 32 + np.arange(32),
            'SR_LANEID': lambda: np.arange(32),
            'SR_CTAID.X': lambda: self.program % x,
            'SR_CTAID.Y': lambda: self.program // x % y,
            'SR_CTAID.Z': lambda: self.program // (x * y),
            **dict.fromkeys(('SR_TID.Y', 'SR_TID.Z', 'SR_CgaCtaId'), lambda: np.zeros(1, I64)),
        }
        if name not in values:
            raise UnknownInstruction(f'the special register {name} is unknown')
        return values[name]()

    def lanes(self, mask: Mask) -> np.ndarray:
        """The lanes that take part, (warps, 32)."""
        return self.everyone if mask is None else self.everyone & mask

    def access(self, active: np.ndarray, instruction: str, constant: bool = False) -> Access:
        """What is known of an access by the active lanes."""

        def lanes(number: np.ndarray) -> np.ndarray:
            return (number | self.no_number)[active]

        tag = lanes(tags(self.program, self.epoch, self.warp))
        if not self.launch.traces_barriers:
            return Access(instruction, tag, constant=constant)
        since = lanes(tags(self.program, self.since, self.none))
        return Access(instruction, tag, since, lanes(self.barrier), constant)

    def locate(self, space: str, address: np.ndarray, active: np.ndarray) -> tuple[Memory, np.ndarray]:
        """The memory of an address space, 'G', 'S' or 'L', and where in it the addresses of the active lanes lie."""
        if space == 'G':
            return self.launch.memory, (address - self.launch.base | self.no_number)[active]
        if space == 'S':
            memory, size, begin, owner = self.shared, self.launch.shared, SHARED_BASE, self.slot
        else:
            thread = np.arange(active.size).reshape(active.shape)
            memory, size, begin, owner = self.local, self.stack, STACK_TOP - self.stack, thread
        offset = address - begin
        place = np.where((offset >= 0) & (offset < size), owner * size + offset, -16)
        return memory, (place | self.no_number)[active]

    def fault(self, kind: str, instruction: Instruction, where: np.ndarray) -> None:
        if where.any():
            self.launch.faults[Fault(kind, str(instruction), 'registers')] += int(where.sum())

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for rank in np.unique(self.rank):
            self.add(0, self.everyone & (self.rank == rank))
        for _ in range(MOST_BRANCHES):
            if not (self.groups or self.release()):
                break
            key = min(self.groups)
            self.advance(*key, self.groups.pop(key))
        else:
            raise Deadlock('threads go round for ever')
        if self.alive.any():
            waiting = sorted({str(self.launch.steps[i - 1].instruction) for i in self.resume[self.alive]})
            raise Deadlock(f'threads wait for ever, the others having ended or waiting elsewhere: {waiting}')

    def add(self, index: int, threads: np.ndarray) -> None:
        """Let threads go on at an instruction, each among those of its rank."""
        for rank in np.unique(np.broadcast_to(self.rank, threads.shape)[threads]):
            some = threads & (self.rank == rank)
            before = self.groups.get((rank, index))
            self.groups[rank, index] = some if before is None else before | some

    def release(self) -> bool:
        """Let those go on whom all of their program or party have joined; whether there are any."""
        if not self.alive.any():
            return False
        self.join()
        warps = self.launch.warps
        missing = (self.alive & ~self.at_barrier).reshape(-1, warps * 32).any(1)
        free = self.at_barrier & ~np.repeat(missing, warps)[:, None]
        if free.any():
            self.pass_barrier(free)
            self.launch.barriers = max(self.launch.barriers, int(self.epoch.max()))
            self.at_barrier &= ~free
            self.add_each(free)
        return bool(self.groups)

    def pass_barrier(self, threads: np.ndarray) -> None:
        """Begin a new epoch for the programs of some threads, which all wait at barriers."""
        passing = threads.any(1, keepdims=True)
        at = np.where(threads, self.resume - 1, -1).reshape(-1, self.launch.warps * 32)
        last, first = at.max(1), np.where(at < 0, len(self.launch.steps), at).min(1)
        # Where warps of a program wait at several barriers, none of them alone keeps them apart: -2.
        barrier = np.repeat(np.where(first == last, last, -2), self.launch.warps)[:, None]
        another = passing & ((barrier != self.barrier) | (barrier == -2))
        self.since = np.where(another, self.epoch, self.since)
        self.barrier = np.where(passing, barrier, self.barrier)
        self.epoch += passing

    def add_each(self, threads: np.ndarray) -> None:
        for index in np.unique(self.resume[threads]):
            self.add(int(index), threads & (self.resume == index))

    def join(self) -> None:
        """Let those go on that meet where their warp parted."""
        for barrier in np.unique(self.joining[self.joining >= 0]):
            here = (self.joining == barrier) & self.alive
            arrived, living = _as_bits(here), _as_bits(self.alive)
            free = here & (self.party[barrier] & living & ~arrived == 0)
            self.joining[free] = -1
            self.add_each(free)

    def advance(self, rank: int, index: int, threads: np.ndarray) -> None:
        """Run threads from an instruction on, up to where they part, wait, or come to others of their rank."""
        steps, issued, observe = self.launch.steps, self.launch.issued, self.observe
        others = min((i for r, i in self.groups if r == rank), default=len(steps))
        whole = threads.all()
        warps = int(threads.any(1).sum())
        while True:
            step = steps[index]
            issued[index] += warps
            mask = None if whole else threads
            if step.guard is not None:
                guard = step.guard(self)
                mask = guard if whole else guard & threads
            if observe is not None:
                observe(index, threads, mask)
            if (mask is None or mask.any()) and index != self.launch.skipped:
                if step.execute is None:
                    getattr(self, f'_{step.control.lower()}')(step, index, threads, self.lanes(mask))
                    return
                step.execute(self, mask)
            index += 1
            if index >= others:
                self.add(index, threads)
                return

    # ---- control flow: what the threads that are here do, some of which take part ------------------------------------

    def _bra(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        if step.predicate is not None:
            active = active & step.predicate(self)
        stay = threads & ~active
        if active.any():
            self.add(step.target, active)
        if stay.any():
            self.add(index + 1, stay)

    _call = _bra

    def _ret(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        back = self.registers[step.target] // U32(INSTRUCTION_BYTES)
        for target in np.unique(back[active]):
            self.add(int(target), active & (back == target))
        self._stay(index, threads & ~active)

    def _exit(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        self.alive &= ~active
        self._stay(index, threads & ~active)

    def _bar(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        self.at_barrier |= active
        self.resume[active] = index + 1
        self._stay(index, threads & ~active)

    def _bssy(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        self.party[step.barrier][active] = np.broadcast_to(_as_bits(active), active.shape)[active]
        self._stay(index, threads)

    def _break(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        self.party[step.barrier] &= ~_as_bits(active)
        self._stay(index, threads)

    def _bsync(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        self.joining[active] = step.barrier
        self.resume[active] = index + 1
        self._stay(index, threads & ~active)
        self.join()

    def _warpsync(self, step: Step, index: int, threads: np.ndarray, active: np.ndarray) -> None:
        party = 15  # which the compiler leaves free
        self.party[party][active] = U32(0xFFFFFFFF)
        self.joining[active] = party
        self.resume[active] = index + 1
        self._stay(index, threads & ~active)
        self.join()

    def _stay(self, index: int, threads: np.ndarray) -> None:
        if threads.any():
            self.add(index + 1, threads)


def _as_bits(lanes: np.ndarray) -> np.ndarray:
    """Lanes of each warp as the bits of a number, (warps, 1)."""
    return (lanes * (U32(1) << np.arange(32, dtype=U32))).sum(1, dtype=U32)[:, None]
