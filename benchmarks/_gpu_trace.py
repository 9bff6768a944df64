# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels do, without a card: the host code's launches, and a few programs of each, run by the emulator.

The emulator is that of `tests/sass`. Here it runs on memory that holds zeros and keeps nothing, so that a launch may be
of any size: no branch of the kernels hangs on what they read.
"""

from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from _gpu_sm import CHIP, INSIDE, LATENCY, Scheduled, Trace, schedule, simulate  # which finds the emulator
from sass.disassembly import Kernel
from sass.launch import BASE, install, prepare
from sass.machine import Launch, Warps
from sass.memory import EPOCH_BITS, SEVERAL_WARPS, WARP_BITS, Access, Memory
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

SECTOR = 32  # bytes
ROW_SHIFT = 40  # bits of a sector's number
L1, L2 = -2, -1  # where a sector is; from 0 on are the numbers of tensors, for those that are new to the SM

Cache = OrderedDict[int, None]  # of sectors, those that were used last at its end


def keep(cache: Cache, sector: int, room: float) -> None:
    """Put a sector into a cache, which forgets what was used longest ago."""
    cache[sector] = None
    cache.move_to_end(sector)
    if len(cache) > room:
        cache.popitem(last=False)


class Blank(Memory):
    """Global memory that reads as zeros; it notes who touched what."""

    def __init__(self) -> None:
        super().__init__(0, str)
        self.touched: dict[int, tuple[bool, np.ndarray, np.ndarray]] = {}  # by step: stores, tags, sectors
        self.step = 0

    def _note(self, stores: bool, address: np.ndarray, access: Access) -> None:
        self.touched[self.step] = stores, access.tag, address // SECTOR

    def load(self, address: np.ndarray, size: int, access: Access) -> np.ndarray:
        self._note(False, address, access)
        return np.zeros((max(size // 4, 1), len(address)), np.uint32)

    def store(self, address: np.ndarray, values: np.ndarray, size: int, access: Access) -> None:
        self._note(True, address, access)


class Traced(Warps):
    """Warps that note what they issue."""

    def __init__(self, launch: Launch, programs: np.ndarray) -> None:
        super().__init__(launch, programs)
        self.steps: list[tuple[int, int, int]] = []  # instruction, warps that came to it, warps that took part

    def observe(self, index: int, threads: np.ndarray, mask: np.ndarray | None) -> None:
        came = as_bits(threads)
        self.launch.memory.step = len(self.steps)
        self.steps.append((index, came, came if mask is None else as_bits(threads & mask)))


def as_bits(threads: np.ndarray) -> int:
    """Warps of which any thread is meant, as bits."""
    return int.from_bytes(np.packbits(threads.any(1), bitorder='little').tobytes(), 'little')


@dataclass
class Accesses:
    """Accesses to global memory by programs that ran.

    Args:
        answers: Requests of 128 bytes and cycles until the answer, for each warp by step.
        read: Sectors that each program has read.
        written: Sectors that each program has written.
        missed: Reads of sectors that L1 did not hold.
    """

    answers: list[dict[int, tuple[int, int]]]
    read: list[set[int]]
    written: list[set[int]]
    missed: int = 0


@dataclass
class Run:
    """A launch, and what a few of its programs did.

    Args:
        kernel: The kernel.
        options: Its compile-time options.
        programs: Programs of the launch.
        warps: Warps of a program.
        shared: Bytes of shared memory of a program.
        tensors: Address and bytes of its tensors.
        samples: Numbers of the programs that ran.
        steps: What they did together, in order: an instruction, the warps that came to it and those that took part, as
            bits, where the warps of one program follow those of another.
        touched: Accesses to global memory by the step: whether it is written, and tag and sector of each lane.
    """

    kernel: Kernel
    options: dict[str, Any]
    programs: int
    warps: int
    shared: int
    tensors: list[tuple[int, int]]
    samples: list[int]
    steps: list[tuple[int, int, int]]
    touched: dict[int, tuple[bool, np.ndarray, np.ndarray]]

    @property
    def name(self) -> str:
        return self.kernel.name.lstrip('_')

    @cached_property
    def room(self) -> int:
        """How many programs an SM has room for."""
        warp = -(-self.kernel.registers * 32 // 256) * 256  # registers are given in parcels, by four schedulers
        by_registers = int(CHIP['registers'] / 4) // warp * 4 // self.warps
        by_shared = int(CHIP['shared_bytes']) // (self.shared + 1024)
        return int(min(by_registers, by_shared, CHIP['warps'] // self.warps, CHIP['programs']))

    @cached_property
    def busiest(self) -> int:
        """Programs of the SM that has most."""
        return -(-self.programs // int(CHIP['sms']))

    @cached_property
    def resident(self) -> int:
        """Programs that are on an SM at a time."""
        return min(self.room, self.busiest)

    @cached_property
    def code(self) -> list[Scheduled]:
        return [schedule(instruction) for instruction in self.kernel.instructions]

    @cached_property
    def counts(self) -> Counter[str]:
        """Instructions that the warps of a program issue, by class."""
        counts: Counter[str] = Counter()
        for index, came, _ in self.steps:
            counts[self.code[index].kind] += came.bit_count()
        return Counter({kind: count / len(self.samples) for kind, count in counts.items()})

    @cached_property
    def traces(self) -> list[Trace]:
        """What each of the programs did; loads are answered by the cache of the SM, the L2, or DRAM."""
        index, came, took = (np.array(column, np.uint64) for column in zip(*self.steps, strict=True))
        answers, one = self.accesses.answers, np.uint64(1)
        traces = []
        for slot in range(len(self.samples)):
            warps = range(slot * self.warps, (slot + 1) * self.warps)
            rows = [np.nonzero(came >> np.uint64(w) & one)[0] for w in warps]
            traces.append(
                Trace(
                    [
                        self._steps(index[row], took[row] >> np.uint64(w) & one)
                        for w, row in zip(warps, rows, strict=True)
                    ],
                    [_placed(answers[w], row) for w, row in zip(warps, rows, strict=True)],
                )
            )
        return traces

    def _steps(self, index: np.ndarray, live: np.ndarray) -> list[Scheduled]:
        """What a warp issues, from instructions and whether any lane takes part."""
        steps = [(instruction.idle, instruction) for instruction in self.code]
        return [steps[i][some] for i, some in zip(index.tolist(), live.tolist(), strict=True)]

    @cached_property
    def accesses(self) -> Accesses:
        """What was touched, and what answers: L1 and L2, of which each program has its part, or DRAM.

        What several programs read, one of them has from DRAM, and the others from L2.
        """
        warps, programs = self.warps, range(len(self.samples))
        room = (CHIP['cache_bytes'] - self.resident * (self.shared + 1024)) / self.resident / SECTOR
        room2 = CHIP['l2_bytes'] / min(self.programs, self.resident * CHIP['sms']) / SECTOR
        begins = [(begin - BASE) // SECTOR for begin, _ in self.tensors]
        caches: list[tuple[Cache, Cache]] = [(OrderedDict(), OrderedDict()) for _ in programs]
        found = Accesses(
            [{} for _ in range(warps * len(programs))], [set() for _ in programs], [set() for _ in programs]
        )
        new: Counter[int] = Counter()  # sectors of each tensor that a program had not touched before
        slot_of = np.zeros(max(self.samples) + 1, np.int64)
        slot_of[self.samples] = programs
        for step, (stores, tag, sector) in self.touched.items():  # in the order of steps
            row = slot_of[(tag >> (WARP_BITS + EPOCH_BITS)) - 1] * warps + (tag & SEVERAL_WARPS)
            keys, last = np.unique(row << ROW_SHIFT | sector).tolist(), -1
            for key in keys:
                w, x = key >> ROW_SHIFT, key & (1 << ROW_SHIFT) - 1
                if w != last:
                    last, slot, requests, place = w, w // warps, 0, L1
                    (l1, l2), read, written = caches[slot], found.read[slot], found.written[slot]
                requests += 1
                if stores:
                    written.add(x)
                    keep(l2, x, room2)
                elif x in l1:
                    l1.move_to_end(x)
                else:
                    found.missed += 1
                    if x in l2:
                        place = max(place, L2)
                    elif x in read or x in written:
                        place = len(begins)
                    else:
                        tensor = bisect(begins, x) - 1
                        new[tensor] += 1
                        place = max(place, tensor)
                    read.add(x)
                    keep(l1, x, room)
                    keep(l2, x, room2)
                found.answers[w][step] = -(-requests // 4), place
        scale = SECTOR * self.programs / len(self.samples)
        share = [min(1.0, size / max(1, new[i] * scale)) for i, (_, size) in enumerate(self.tensors)] + [1.0]
        owed = [0.0] * len(share)
        for answers in found.answers:
            for step, (requests, place) in answers.items():
                level = 'l1' if place == L1 else 'l2'
                if place >= 0:
                    owed[place] += share[place]
                    if owed[place] >= 1:
                        owed[place] -= 1
                        level = 'dram'
                answers[step] = requests, LATENCY[level]
        return found

    @cached_property
    def requests(self) -> float:
        """Requests of 128 bytes, and shuffles, that the warps of a program make."""
        to_global = sum(requests for answers in self.accesses.answers for requests, _ in answers.values())
        others = sum(self.code[i].cycles * came.bit_count() for i, came, _ in self.steps if self.code[i].kind in INSIDE)
        return (to_global + others) / len(self.samples)

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes of all programs between SMs and L2, and between L2 and DRAM if each byte goes there once."""
        found = self.accesses
        scale = SECTOR * self.programs / len(self.samples)
        dram = 0.0
        for touched in (found.read, found.written):
            sectors = np.array([x for each in touched for x in each], np.int64)
            for begin, size in self.tensors:
                inside = (sectors >= (begin - BASE) // SECTOR) & (sectors <= (begin - BASE + size - 1) // SECTOR)
                dram += min(inside.sum() * scale, size)
        return dict(l2=(found.missed + sum(map(len, found.written))) * scale, dram=float(dram))

    def cycles(self, most: int | None = None) -> tuple[float, Counter[str]]:
        """Cycles of the launch on the SM that has most programs, and those that warps wait, by what for."""
        full, rest = divmod(self.busiest, self.resident)
        total, waits = 0.0, Counter[str]()
        for count, times in ((self.resident, full), (rest, 1)):
            if count and times:
                taken, waited = simulate([self.traces[i % len(self.traces)] for i in range(count)], most)
                total += times * taken
                waits.update({cause: times * cycles for cause, cycles in waited.items()})
        return total, waits


def _placed(answers: dict[int, tuple[int, int]], row: np.ndarray) -> dict[int, tuple[int, int]]:
    """Answers by the place in a warp's list in place of the step."""
    return dict(zip(np.searchsorted(row, list(answers)).tolist(), answers.values(), strict=True))


@dataclass
class Recorded:
    """A launch that has not run.

    Args:
        launch: The launch.
        tensors: Address and bytes of its tensors.
        options: Its compile-time options.
    """

    launch: Launch
    tensors: list[tuple[int, int]]
    options: dict[str, Any]

    def run(self, samples: int) -> Run:
        """Run a few programs that lie evenly in the grid."""
        launch, total = self.launch, self.launch.programs
        samples = min(samples, 64 // launch.warps)  # whose warps are bits of a number
        programs = np.unique([(2 * i + 1) * total // (2 * samples) for i in range(samples)])
        warps = Traced(launch, programs)
        with np.errstate(all='ignore'):
            warps.run()
        return Run(
            launch.kernel,
            self.options,
            total,
            launch.warps,
            launch.shared,
            self.tensors,
            programs.tolist(),
            warps.steps,
            launch.memory.touched,
        )


@dataclass
class Recorder:
    """Runs host code on tensors without data, and keeps its launches."""

    found: list[Recorded] = field(default_factory=list)

    def __post_init__(self) -> None:
        install(self.record)
        from triton.runtime.jit import JITFunction

        from vssm.ops.scan.triton import launch

        launch.processors = lambda device: int(CHIP['sms'])

        run = JITFunction.run

        def run_on_real(kernel: JITFunction, *args: Any, **options: Any) -> Any:
            with unset_fake_temporarily():
                self.storages: dict[int, torch.UntypedStorage] = {}
                return run(kernel, *map(self.real, args), **{name: self.real(v) for name, v in options.items()})

        run_on_real.emulates = True
        JITFunction.run = run_on_real

    def real(self, value: Any) -> Any:
        """A tensor like a fake one, in memory that is never touched."""
        if not isinstance(value, FakeTensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
        real = torch.empty(0, dtype=value.dtype).set_(self.storages[storage._cdata])
        return real.as_strided(value.shape, value.stride(), value.storage_offset())

    def record(self, compiled: Any, values: dict[str, Any], grid: tuple[int, int, int]) -> None:
        places: dict[int, int] = {}
        tensors: list[tuple[int, int]] = []
        end = BASE + 4096

        def address(tensor: torch.Tensor) -> int:
            nonlocal end
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in places:
                places[storage.data_ptr()] = end
                tensors.append((end, storage.nbytes()))
                end += -(-storage.nbytes() // 256) * 256 + 4096
            return places[storage.data_ptr()] + tensor.storage_offset() * tensor.element_size()

        launch = prepare(compiled, values, grid, address, Blank())
        options = {n: v for n, v in values.items() if isinstance(v, (bool, int, float)) and n.isupper()}
        self.found.append(Recorded(launch, tensors, options))

    @contextmanager
    def recording(self) -> Iterator[list[Recorded]]:
        """The launches that happen meanwhile; what is made meanwhile are tensors without values."""
        self.found = []
        with FakeTensorMode():
            yield self.found
