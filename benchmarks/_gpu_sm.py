# SPDX-License-Identifier: Apache-2.0
"""A model of one multiprocessor of an H100: when its warps issue their instructions, in order.

A warp issues its next instruction when the stall count of the one before is over, when the scoreboards that it waits
for are free, both of which the compiler has written into the machine code, and when the scheduler and the unit are. The
times until results come back are assumed (`LATENCY`). Of several warps that could issue, the one does that has waited
longest. Not modelled: bank conflicts, caches of instructions, the queues before the memory units, other SMs' traffic.
What warps have waited for is counted, which says what binds where no unit is busy.
"""

import heapq
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / 'tests'))

from sass.disassembly import Instruction  # noqa: E402

CHIP: dict[str, float] = dict(
    sms=132,
    clock_ghz=1.755,
    schedulers=4,  # of an SM, each issues one instruction a cycle
    registers=65536,  # of an SM
    warps=64,
    programs=32,
    shared_bytes=228 * 1024,
    cache_bytes=256 * 1024,  # L1 and shared memory together
    l2_bytes=50e6,
    dram_tb_per_s=3.35,
    elementwise_tb_per_s=3.0,
    product_tflop_per_s=500,
)
LATENCY: dict[str, int] = {  # cycles until a result is there, by class of instruction
    'alu': 4,  # and all of which nothing else is said
    'l1': 38,
    'l2': 270,
    'dram': 600,
    'load shared': 30,
    'spill': 38,
    'shuffle': 24,
    'special': 20,
    'convert': 14,
    'constant': 8,
    'product': 33,
    'group product': 32,  # and half as many as it has columns
    'barrier': 24,  # from the last warp that comes to it
    'read': 12,  # until operands of loads and stores have been read
}
# Cycles in which a unit of a scheduler takes no other instruction. There are two for float32, each for 16 lanes.
OCCUPANCY: dict[str, int] = dict(fp32=2, alu=2, imad=2, wide=4, special=8, convert=2, product=8)

ALU = set(
    'IADD3 LOP3 ISETP SEL SHF LEA FMNMX PRMT FSEL FSETP FSET VIMNMX P2R R2P IABS MOV VIADD VIADDMNMX PLOP3 SGXT CS2R '
    'F2FP VOTE I2FP'.split()
)
CONTROL = set('BRA EXIT CALL RET NOP BSSY BSYNC BREAK WARPSYNC YIELD DEPBAR WARPGROUP MEMBAR FENCE'.split())
CLASSES = {
    **dict.fromkeys(('FFMA', 'FADD', 'FMUL', 'HFMA2', 'HADD2', 'HMUL2'), 'fp32'),
    **dict.fromkeys(ALU, 'alu'),
    **dict.fromkeys(('I2F', 'F2I', 'F2F', 'FRND', 'POPC'), 'convert'),
    **dict.fromkeys(('LDC', 'ULDC', 'S2R', 'S2UR', 'R2UR'), 'constant'),
    **dict.fromkeys(CONTROL, 'control'),
    **dict.fromkeys(('LDS', 'LDSM'), 'load shared'),
    **dict.fromkeys(('STS', 'STSM'), 'store shared'),
    **dict.fromkeys(('LDL', 'STL'), 'spill'),
    'VOTEU': 'uniform',
    'MUFU': 'special',
    'LDG': 'load',
    'STG': 'store',
    'SHFL': 'shuffle',
    'BAR': 'barrier',
    'HMMA': 'product',
    'HGMMA': 'group product',
}
INSIDE = {'load shared', 'store shared', 'spill', 'shuffle'}  # of an SM
MEMORY = {'load', 'store'} | INSIDE


def class_of(instruction: Instruction) -> str:
    """The class of an instruction: the unit that executes it.

    Raises:
        KeyError: It is unknown.
    """
    name, modifiers = instruction.name, instruction.modifiers
    if name == 'IMAD':
        return 'wide' if 'WIDE' in modifiers or 'HI' in modifiers else 'imad'
    if name[0] == 'U' and name not in CLASSES:
        return 'uniform'
    return CLASSES[name]


@dataclass(frozen=True)
class Scheduled:
    """What the model knows of an instruction.

    Args:
        kind: Its class.
        unit: The unit that takes it; empty if none is modelled.
        stall: Cycles until the warp's next instruction.
        writes: Scoreboard that is freed with the result; 7 for none.
        reads: Scoreboard that is freed when the operands have been read; 7 for none.
        waits: Scoreboards that must be free.
        cycles: Cycles in which the unit takes no other.
        latency: Cycles until the result is there.
        joins: Whether it waits for products that a group of warps has begun.
    """

    kind: str
    unit: str
    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]
    cycles: int
    latency: int
    joins: bool

    @cached_property
    def idle(self) -> 'Scheduled':
        """The same where no lane takes part, so that no unit does anything."""
        return replace(self, unit='', cycles=0, latency=LATENCY['alu'])


WIDTHS = {'64': 2, '128': 4, '2': 2, '4': 4}  # requests of 128 bytes that an access within the SM makes, by modifier
UNITS = dict(imad='heavy', wide='heavy', fp32='float') | {'group product': 'product'} | dict.fromkeys(MEMORY, 'memory')


def schedule(instruction: Instruction) -> Scheduled:
    """Read what the compiler has told the scheduler, and look up the rest."""
    kind, bits = class_of(instruction), instruction.encoding >> 105
    cycles, latency = OCCUPANCY.get(kind, 0), LATENCY.get(kind, LATENCY['alu'])
    if kind in MEMORY:
        cycles = max((WIDTHS.get(modifier, 1) for modifier in instruction.modifiers), default=1)
    elif kind == 'group product':
        columns = int(instruction.modifiers[0].split('x')[1])
        cycles, latency = columns // 2, latency + columns // 2
    waits = tuple(i for i in range(6) if bits >> 11 + i & 1)
    if instruction.name == 'DEPBAR':  # taken to wait for all of its scoreboard
        waits += (int(instruction.operands[0].text[2:]),)
    joins = instruction.name == 'WARPGROUP' and 'DEPBAR' in instruction.modifiers
    unit = UNITS.get(kind, kind if kind in OCCUPANCY else '')
    return Scheduled(kind, unit, bits & 15 or 1, bits >> 5 & 7, bits >> 8 & 7, waits, cycles, latency, joins)


@dataclass
class Trace:
    """What the warps of one program issue, and when each global load is answered.

    Args:
        steps: Instructions, for each warp.
        memory: Requests of 128 bytes and cycles until the answer, by warp and place in its list.
    """

    steps: list[list[Scheduled]]
    memory: list[dict[int, tuple[int, int]]]


class Warp:
    """Where a warp is, and when what it has begun is done.

    Args:
        program: Number of its program among those on the SM.
        steps: What it issues.
        memory: What its trace says of global memory.
        end: Number of steps after which it is no longer looked at.
    """

    def __init__(self, program: int, steps: list[Scheduled], memory: dict[int, tuple[int, int]], end: int) -> None:
        self.program, self.steps, self.memory, self.end = program, steps, memory, end
        self.at = 0
        self.boards = [0] * 8
        self.holders = [''] * 8  # the kind of what each of them waits for
        self.joined = 0
        self.stopped = 0  # the cycle in which it came to a barrier


class Scheduler:
    """A quarter of an SM: the cycle from which on it, and each of its units, takes another instruction."""

    def __init__(self) -> None:
        self.free = 0
        self.units = dict.fromkeys(('alu', 'special', 'convert', 'product', 'heavy', 'light'), 0)

    def unit_of(self, step: Scheduled) -> str:
        """That of the units that takes a step; arithmetic in float32 is done by two."""
        if step.unit == 'float':
            return 'heavy' if self.units['heavy'] <= self.units['light'] else 'light'
        return step.unit


class Sm:
    """A multiprocessor, on which programs run.

    Args:
        programs: What each program does.
        most: Steps of a warp after which no more are looked at.
    """

    QUEUE = 4  # cycles that the memory units may be behind
    APART = 37  # cycles from the begin of a program to that of the next

    def __init__(self, programs: Sequence[Trace], most: int | None) -> None:
        longest = max(len(steps) for trace in programs for steps in trace.steps)
        self.share = 1.0 if most is None else min(1.0, most / longest)
        self.warps = [
            Warp(i, steps, memory, max(1, int(len(steps) * self.share)))
            for i, trace in enumerate(programs)
            for steps, memory in zip(trace.steps, trace.memory, strict=True)
        ]
        self.schedulers = [Scheduler() for _ in range(int(CHIP['schedulers']))]
        self.memory = 0  # the cycle from which on the memory units take another request
        self.waiting: list[list[int]] = [[] for _ in programs]  # warps at a barrier
        self.running = [len(trace.steps) for trace in programs]
        self.queue = [(self.APART * warp.program, w) for w, warp in enumerate(self.warps)]
        self.waits: Counter[str] = Counter()  # cycles that warps wait, by what for: a kind of result, a unit, a slot

    def run(self) -> float:
        """Cycles until all programs have ended."""
        finish, queue, warps, schedulers = 0, self.queue, self.warps, self.schedulers
        heapq.heapify(queue)
        while queue:
            now, w = queue[0]
            warp, scheduler = warps[w], schedulers[w & 3]
            step = warp.steps[warp.at]
            ready, cause = self.ready(warp, scheduler, step)
            if ready > now:
                self.waits[cause] += ready - now
                heapq.heapreplace(queue, (ready, w))
                continue
            self.issue(warp, scheduler, step, now)
            if warp.at < warp.end and step.kind != 'barrier':
                heapq.heapreplace(queue, (now + step.stall, w))
                continue
            heapq.heappop(queue)
            if warp.at >= warp.end:
                finish = max(finish, now + step.stall)
                self.running[warp.program] -= 1
            else:
                warp.stopped = now
                self.waiting[warp.program].append(w)
            self.release(warp.program, now)
        return finish / self.share

    def ready(self, warp: Warp, scheduler: Scheduler, step: Scheduled) -> tuple[int, str]:
        """The first cycle in which nothing more that is known by now keeps a step from being issued, and what did."""
        ready, cause = scheduler.free, 'slot'
        for board in step.waits:
            if warp.boards[board] > ready:
                ready, cause = warp.boards[board], warp.holders[board]
        if step.joins and warp.joined > ready:
            ready, cause = warp.joined, 'product'
        if step.unit:
            memory = step.unit == 'memory'
            free = self.memory - self.QUEUE if memory else scheduler.units[scheduler.unit_of(step)]
            if free > ready:
                ready, cause = free, f'unit {step.unit}'
        return ready, cause

    def issue(self, warp: Warp, scheduler: Scheduler, step: Scheduled, now: int) -> None:
        scheduler.free, done = now + 1, now + step.latency
        if step.unit == 'memory':
            requests, latency = warp.memory.get(warp.at) or (step.cycles, step.latency)
            self.memory = max(self.memory, now) + requests
            done = self.memory + latency
        elif step.unit:
            scheduler.units[scheduler.unit_of(step)] = now + step.cycles
            if step.kind == 'group product':
                warp.joined = done
        for board, until in ((step.writes, done), (step.reads, now + LATENCY['read'])):
            if until > warp.boards[board]:
                warp.boards[board], warp.holders[board] = until, step.kind
        warp.at += 1

    def release(self, program: int, now: int) -> None:
        """Let the warps of a program go on, if all that still run are at a barrier."""
        if len(self.waiting[program]) == self.running[program]:
            for w in self.waiting[program]:
                self.waits['barrier'] += now + LATENCY['barrier'] - self.warps[w].stopped
                heapq.heappush(self.queue, (now + LATENCY['barrier'], w))
            self.waiting[program] = []


def simulate(programs: Sequence[Trace], most: int | None = None) -> tuple[float, Counter[str]]:
    """Cycles in which programs that share an SM are done, and those that their warps wait, by what for.

    Args:
        programs: What each program does.
        most: Steps of a warp to look at; the rest is taken to go on at the same pace. None for all of them.
    """
    sm = Sm(programs, most)
    return sm.run(), sm.waits
