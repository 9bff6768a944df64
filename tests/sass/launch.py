# SPDX-License-Identifier: Apache-2.0
"""What stands in for Triton's launch: kernels are compiled for sm_90 and run by the emulator, on tensors of the CPU.

`install` puts it in place, for the rest of the process: kernels must be compiled, and not be interpreted as in the
tests' own process.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .disassembly import Kernel, dump, parse_kernel
from .machine import STACK_POINTER, STACK_TOP, Launch
from .memory import POISON, UNIT, Memory

CAPABILITY = 90
BASE = 0x7F0000000000  # of global memory
GAP = 4096  # bytes between tensors, so that an address that leaves one enters no other


Execute = Callable[[Any, dict[str, Any], tuple[int, int, int]], None]  # of a compiled kernel, its arguments, its grid

current: list[Launch] = []  # what ran since `emulation` began


def install(execute: Execute | None = None) -> None:
    """Compile kernels for sm_90 in this process, and let the emulator run them, or hand them to `execute`."""
    os.environ.pop('TRITON_INTERPRET', None)
    os.environ.setdefault('TRITON_CACHE_DIR', tempfile.mkdtemp())
    from compile_cuda import Card
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Card(CAPABILITY))
    if getattr(JITFunction.run, 'emulates', False):
        return
    compile_and_bind, execute = JITFunction.run, execute or emulate

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_and_bind(self, *args, grid=grid, warmup=True, **kwargs)
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        grid = tuple(grid(values) if callable(grid) else grid)
        if not warmup:
            execute(compiled, values, (*grid, 1, 1)[:3])
        return compiled

    run.emulates = True
    JITFunction.run = run


@contextmanager
def emulation() -> Iterator[list[Launch]]:
    """Collect the launches that happen meanwhile; what is not written of a new tensor holds poison."""
    current.clear()
    with Poison():
        yield current


class Poison(TorchDispatchMode):
    """Fills tensors that come without values, as from torch.empty, with what the emulator takes for unwritten."""

    EMPTY = ('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.EMPTY:
            data = bytes_of(result)
            data[::2], data[1::2] = POISON & 0xFF, POISON >> 8
        return result


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


@functools.lru_cache(maxsize=16)
def kernel_of(compiled: Any) -> Kernel:
    """The machine code of a compiled kernel; its dump, which takes a while, is kept beside what Triton keeps."""
    file = Path(os.environ['TRITON_CACHE_DIR']) / f'{compiled.hash}.dump'
    if not file.exists():
        part = file.with_suffix(f'.{os.getpid()}')
        part.write_text(dump(compiled.asm['cubin']))
        part.rename(file)  # whole, for other processes
    return parse_kernel(file.read_text())


def emulate(compiled: Any, values: dict[str, Any], grid: tuple[int, int, int]) -> None:
    """Run a compiled kernel over a grid, and write what it wrote into its tensors."""
    tensors = {name: value for name, value in parameters(compiled, values).items() if isinstance(value, torch.Tensor)}
    arena = Arena(tensors)
    launch = prepare(compiled, values, grid, arena.address, arena.memory)
    launch.run()
    arena.write_back()
    current.append(launch)


def parameters(compiled: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a compiled kernel takes when it runs, by name."""
    return {name: values[name] for name, type_ in compiled.src.signature.items() if type_ != 'constexpr'}


def prepare(
    compiled: Any,
    values: dict[str, Any],
    grid: tuple[int, int, int],
    address: Callable[[torch.Tensor], int],
    memory: Memory,
) -> Launch:
    """A launch that can be run, where `address` says where in global memory, which begins at BASE, a tensor lies."""
    kernel, warps, signature = kernel_of(compiled), compiled.metadata.num_warps, compiled.src.signature
    numbers = [
        address(value) if isinstance(value, torch.Tensor) else number(value, signature[name])
        for name, value in parameters(compiled, values).items()
    ]
    numbers += [0] * (len(kernel.parameters) - len(numbers))  # scratch memory, which no kernel has
    bank = constants(kernel, numbers, grid, warps)
    return Launch(kernel, grid, warps, compiled.metadata.shared, memory, BASE, bank)


def number(value: Any, type_: str) -> int:
    """A parameter as bits."""
    if type_ == 'fp32':
        return int(np.float32(value).view(np.uint32))
    if not isinstance(value, int):
        raise TypeError(f'a parameter of type {type_} is unknown to the emulator, got {value!r}')
    return value


def constants(
    kernel: Kernel, numbers: Sequence[int], grid: tuple[int, int, int], warps: int
) -> dict[tuple[int, int], int]:
    """What a launch puts into constant bank 0: sizes of a program and of the grid, the stack, parameters."""
    sizes = (warps * 32, 1, 1, *grid)
    bank = {(0, 4 * i): size for i, size in enumerate(sizes)}
    bank |= {STACK_POINTER: STACK_TOP, (0, 0x208): 0, (0, 0x20C): 0}  # the last two describe global memory
    for (offset, size), value in zip(kernel.parameters, numbers, strict=True):
        for i in range(0, max(size, 4), 4):
            bank[0, offset + i] = value >> 8 * i & 0xFFFFFFFF
    return bank


class Arena:
    """Global memory that holds the tensors of a launch, and nothing else that may be touched."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.names: dict[int, list[str]] = {}  # of the tensors in a storage, by where that is on the CPU
        self.storages: dict[int, np.ndarray] = {}
        self.begin: dict[int, int] = {}
        size = GAP
        for name, tensor in tensors.items():
            place = tensor.untyped_storage().data_ptr()
            self.names.setdefault(place, []).append(name)
            if place not in self.storages:
                self.storages[place] = bytes_of(tensor)
                self.begin[place] = size + place % 256  # as aligned as it is there
                size = -(-(self.begin[place] + len(self.storages[place]) + GAP) // 256) * 256
        self.memory = Memory(size, self.name_of)
        for place, data in self.storages.items():
            begin = self.begin[place]
            self.memory.units.view(np.uint8)[begin : begin + len(data)] = data
        for tensor in tensors.values():
            self.allow(tensor)

    def allow(self, tensor: torch.Tensor) -> None:
        """Let the elements of a tensor be touched, not what else its storage holds; poison is unwritten."""
        begin = self.begin[tensor.untyped_storage().data_ptr()] // UNIT
        size = tensor.element_size() // UNIT
        if size == 0:
            raise TypeError(f'tensors of one-byte elements are unknown to the emulator, got {tensor.dtype}')
        at = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
        at = at.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).numpy().ravel() * size + begin
        words = np.stack([self.memory.units[at + i] for i in range(size)])
        written = (words != POISON).any(0)
        for i in range(size):
            self.memory.allocated[at + i] = True
            self.memory.initialised[at + i] = written

    def address(self, tensor: torch.Tensor) -> int:
        begin = self.begin[tensor.untyped_storage().data_ptr()]
        return BASE + begin + tensor.storage_offset() * tensor.element_size()

    def name_of(self, address: int) -> str:
        for place, begin in self.begin.items():
            if begin <= address < begin + len(self.storages[place]):
                return ' or '.join(self.names[place])
        return 'no tensor'

    def write_back(self) -> None:
        for place, data in self.storages.items():
            begin = self.begin[place]
            data[:] = self.memory.units.view(np.uint8)[begin : begin + len(data)]
