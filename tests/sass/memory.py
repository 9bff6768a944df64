# SPDX-License-Identifier: Apache-2.0
"""Memory that knows what may be touched, what was written, and by whom since when.

Of every two bytes it keeps the last access of each kind as a tag: program, epoch (how many barriers the program has
passed) and warp. Two warps of a program that touch a place within one epoch, one of them writing, race, unless both
write the same; so do two programs of a launch in any epochs. Threads of one warp keep step and do not race, but what
they write to one place in one instruction must be equal. So a fault is found whatever the order is in which warps
happen to run.

Where barriers are traced, the memory also notes which of them keep two warps apart: those that alone stand between two
accesses of which one writes. Without them there would be a race.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

UNIT = 2  # bytes
POISON = 0x7FA5  # what unwritten memory holds: a NaN in every type of floating-point numbers
POISON_WORD = POISON << 16 | POISON

WARP_BITS, EPOCH_BITS = 6, 26
SEVERAL_WARPS = (1 << WARP_BITS) - 1
SEVERAL_PROGRAMS = 0x7FFFFFFF << (WARP_BITS + EPOCH_BITS)

Lanes = np.ndarray  # one number for each lane that takes part, (n,)


@dataclass(frozen=True)
class Access:
    """What is known of an access, for each lane.

    Args:
        instruction: The instruction.
        tag: Program, epoch and warp.
        since: Tag of the first epoch that only one barrier, passed once or more, separates from this one; None where
            barriers are not traced.
        barrier: Index of that barrier.
        constant: Whether it goes past the caches that see writes of this launch.
    """

    instruction: str
    tag: Lanes
    since: Lanes | None = None
    barrier: Lanes | None = None
    constant: bool = False

    def of(self, lanes: np.ndarray) -> 'Access':
        if self.since is None:
            return Access(self.instruction, self.tag[lanes], constant=self.constant)
        return replace(self, tag=self.tag[lanes], since=self.since[lanes], barrier=self.barrier[lanes])

    def each(self, units: int) -> 'Access':
        """As it is for every one of so many units of an access, in the order of `units_of`."""
        return self if units == 1 else self.of(np.tile(np.arange(len(self.tag)), units))


def units_of(address: Lanes, size: int) -> np.ndarray:
    """The units of an access: the first of every lane, then the second of every lane, and so on."""
    return ((address >> 1) + np.arange(size // UNIT)[:, None]).ravel()


def tags(program: np.ndarray, epoch: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """The tag of an access; 0 stands for none."""
    return (program + 1) << (WARP_BITS + EPOCH_BITS) | epoch << WARP_BITS | warp


@dataclass(frozen=True)
class Fault:
    """What must not happen.

    Args:
        kind: What happened.
        instruction: The instruction that did it.
        place: The tensor, or the kind of memory.
    """

    kind: str
    instruction: str
    place: str

    def __str__(self) -> str:
        return f'{self.kind}: {self.place}, by {self.instruction}'


@dataclass
class Memory:
    """Two-byte units, each with what is known of it.

    Args:
        size: Bytes.
        name_of: What lies at an address, in words.
    """

    size: int
    name_of: Callable[[int], str]
    faults: Counter[Fault] = field(default_factory=Counter)
    needed: set[int] = field(default_factory=set)  # barriers without which there would be a race

    def __post_init__(self) -> None:
        units = -(-self.size // 16) * 8  # whole vectors of 16 bytes
        self.units = np.full(units, POISON, np.uint16)
        self.words = self.units.view(np.uint32)
        self.allocated = np.zeros(units + 8, bool)  # with some that are not, beyond the end
        self.initialised = np.zeros(units, bool)
        self.writer = np.zeros(units, np.int64)
        self.reader = np.zeros(units, np.int64)

    def load(self, address: Lanes, size: int, access: Access) -> np.ndarray:
        """What lies there, (words, n); poison where nothing may be read.

        Args:
            address: Bytes from the beginning of this memory.
            size: Bytes that each lane reads: 2, 4, 8 or 16.
            access: What is known of the access.
        """
        good = self._good(address, size, access.instruction)
        result = np.full((max(size // 4, 1), len(address)), POISON_WORD, np.uint32)
        if not good.all():
            address, access = address[good], access.of(good)
        self._read_units(units_of(address, size), access.each(size // UNIT))
        if size == UNIT:
            result[0, good] = self.units[address >> 1]
        else:
            for i in range(size // 4):
                result[i, good] = self.words[(address >> 2) + i]
        return result

    def store(self, address: Lanes, values: np.ndarray, size: int, access: Access) -> None:
        """Write values, (words, n), as `load` reads them."""
        good = self._good(address, size, access.instruction)
        if not good.all():
            address, values, access = address[good], values[:, good], access.of(good)
        halves = np.stack([values, values >> np.uint32(16)], 1).astype(np.uint16).reshape(2 * len(values), len(address))
        count = size // UNIT
        self._write_units(units_of(address, size), halves[:count].ravel(), access.each(count))

    def _good(self, address: Lanes, size: int, instruction: str) -> np.ndarray:
        """Where an access is aligned and inside of what is allocated."""
        at = address >> 1
        inside = (address >= 0) & (at < len(self.units))
        at = np.where(inside, at, len(self.units))  # where nothing is allocated, nor beyond it
        inside = self.allocated[at + np.arange(size // UNIT)[:, None]].all(0)
        aligned = address & (size - 1) == 0
        good = aligned & inside
        if not good.all():
            self._fault('misaligned address', ~aligned, address >> 1, instruction)
            self._fault('address outside', ~inside, address >> 1, instruction)
        return good

    def _read_units(self, at: Lanes, access: Access) -> None:
        tag, instruction = access.tag, access.instruction
        written = self.initialised[at]
        if not written.all():
            self._fault('read before it was written', ~written, at, instruction)
        writer, reader = self.writer[at], self.reader[at]
        self._compare(writer, 'read', 'written', at, access)
        if access.constant:
            self._fault('constant read of what was written', writer != 0, at, instruction)
        mark = tag
        if (reader != 0).any():  # which the tag replaces, but for what it says of several
            same_epoch, same_program = _shared(reader, tag)
            mark = np.where(same_epoch & (reader != tag), tag | SEVERAL_WARPS, tag)
            mark = np.where((reader != 0) & ~same_program, tag | SEVERAL_PROGRAMS, mark)
        self.reader[at] = mark
        left = self.reader[at]
        lost = left != mark  # another lane left its tag there, in this very instruction
        if lost.any():
            _, same_program = _shared(left, mark)
            mark = np.where(same_program, mark | SEVERAL_WARPS, mark | SEVERAL_PROGRAMS)
            self.reader[at[lost]] = mark[lost]

    def _write_units(self, at: Lanes, value: Lanes, access: Access) -> None:
        self._compare(self.writer[at], 'written', 'written', at, access, self.units[at] == value)
        self._compare(self.reader[at], 'written', 'read', at, access)
        self.writer[at], self.units[at], self.initialised[at] = access.tag, value, True
        stays = self.units[at] == value  # which lanes of this very instruction may have changed
        self._compare(self.writer[at], 'written', 'written', at, access, stays)
        if not stays.all():
            lost = ~stays & (self.writer[at] == access.tag)
            self._fault('lanes write different values', lost, at, access.instruction)

    def _compare(
        self, before: Lanes, now_is: str, before_was: str, at: Lanes, access: Access, harmless: Lanes | bool = False
    ) -> None:
        """Find races and foreign programs among the accesses before this one.

        harmless: Where the values are the same, so that two warps may write them in either order.
        """
        others = (before != 0) & (before != access.tag)
        if not others.any():
            return
        same_epoch, same_program = _shared(before, access.tag)
        both = 'written' if now_is == before_was else 'read and written'
        warps = others & np.logical_not(harmless)
        self._fault(f'race, {both} by two warps', warps & same_epoch, at, access.instruction)
        self._fault(f'{now_is}, {before_was} by another program', others & ~same_program, at, access.instruction)
        if access.since is not None:
            other_warp = (before ^ access.tag) & SEVERAL_WARPS != 0
            kept_apart = warps & same_program & ~same_epoch & other_warp & (before >= access.since)
            self.needed.update(access.barrier[kept_apart].tolist())

    def _fault(self, kind: str, where: np.ndarray, at: Lanes, instruction: str) -> None:
        if where.any():
            place = self.name_of(int(at[where][0]) * UNIT)
            self.faults[Fault(kind, instruction, place)] += int(where.sum())


def _shared(before: np.ndarray, tag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether two accesses are of one epoch of a program, and whether they are of one program."""
    difference = before ^ tag
    return difference >> WARP_BITS == 0, difference >> (WARP_BITS + EPOCH_BITS) == 0
