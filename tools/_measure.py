# SPDX-License-Identifier: Apache-2.0
"""Time and memory of steps, taken so that they can be compared, and the machine that they were taken on."""

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

NO_PEAK = 'no peak memory: it needs CUDA, or Linux with glibc and a writable /proc/self/clear_refs'


@dataclass
class Timing:
    """A step to time and what came of it so far: seconds of one step, a round each, or why it failed."""

    step: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    repeats: int = 1  # of the step in a round


def time_interleaved(
    timings: Iterable[Timing],
    rounds: int,
    warmup: int = 2,
    min_seconds: float = 0.0,
    synchronize: Callable[[], Any] = lambda: None,
) -> None:
    """Time steps in rounds of one turn each, so that a machine's drift hits all alike.

    The timings are filled as they come: what interrupts the rounds leaves what is done. A step that fails is left out
    from then on.

    Args:
        timings: What to time.
        rounds: How many to keep.
        warmup: How many to run before.
        min_seconds: A step that is quicker is repeated so often that its turn takes as long.
        synchronize: Waits for the device, before and after a turn.
    """
    timings = list(timings)
    for number in range(-warmup, rounds):
        for timing in timings:
            if timing.error is not None:
                continue
            try:
                synchronize()
                start = time.perf_counter()
                for _ in range(timing.repeats):
                    timing.step()
                synchronize()
                seconds = (time.perf_counter() - start) / timing.repeats
            except Exception as error:
                timing.error = one_line(error)
                continue
            if number < 0:
                timing.repeats = math.ceil(max(1.0, min_seconds / max(seconds, 1e-9)))
            else:
                timing.seconds.append(seconds)


def median_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The median, and half of the interquartile range: half of the values lie about so near the median."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], None
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return middle, (high - low) / 2


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__


# ---- memory ----------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ('not enough memory', 'allocate memory', 'out of memory')  # of PyTorch's CPU allocator and of libraries
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def fit_batch(trial: Callable[[int], Any], batch_size: int) -> int:
    """Halve a batch until a trial of it fits into memory; return its size."""
    while True:
        try:
            trial(batch_size)
            return batch_size
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        free_memory()  # here, where no traceback holds the tensors any more
        batch_size //= 2


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_growth(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which a step that ran before raises the memory in use at most, None where that cannot be had.

    On the CPU they are the process's, as the system sees them: with what the allocator and libraries need beyond the
    tensors. They are right within some 10 MB, up to 40 MB where other models ran before in this process.
    """
    free_memory()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # The allocator keeps what was freed, so that a step that runs again finds all its memory there and the process
        # does not grow at all, unless it is given back first.
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
    except (AttributeError, OSError, TypeError):
        return None
    step()
    return max(0, _status_bytes('VmHWM') - before)


def _status_bytes(key: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1]) * 1024
    raise OSError(f'/proc/self/status has no {key}.')


# ---- the machine -----------------------------------------------------------------------------------------------------


def conditions(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the options: processor, threads, clock, kernels, versions."""
    from .env import backends

    states = backends()
    kernels = 'reference' if states['reference'].startswith('on') else states[device.type.upper()]
    return dict(
        processor=torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        clock_mhz=_clock_mhz(device),
        kernels=kernels.removeprefix('on: '),
        python=platform.python_version(),
        cuda=torch.version.cuda if device.type == 'cuda' else None,
        tf32=torch.backends.cudnn.allow_tf32 if device.type == 'cuda' else None,  # of convolutions in float32
        vssm=__version__,
        **{package: importlib.metadata.version(package) for package in ('torch', 'timm', 'fvcore')},
    )


def _cpu_name() -> str:
    return _cpuinfo('model name')[0] if _cpuinfo('model name') else platform.processor() or platform.machine()


def _cpuinfo(key: str) -> list[str]:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return []
    return [line.partition(':')[2].strip() for line in lines if line.startswith(key)]


def _clock_mhz(device: torch.device) -> int | None:
    """The median of the cores' clocks, or the GPU's, now; None where it cannot be read."""
    if device.type == 'cuda':
        try:
            return torch.cuda.clock_rate(device)
        except Exception:  # it needs another package, and a driver that tells
            return None
    files = Path('/sys/devices/system/cpu').glob('cpu[0-9]*/cpufreq/scaling_cur_freq')
    clocks = [int(file.read_text()) / 1e3 for file in files] or [float(text) for text in _cpuinfo('cpu MHz')]
    return round(statistics.median(clocks)) if clocks else None
