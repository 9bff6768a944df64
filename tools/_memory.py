# SPDX-License-Identifier: Apache-2.0
"""How much memory a step needs, and what to do where there is too little."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NO_PEAK = 'no peak memory: it needs CUDA, or Linux with glibc and a writable /proc/self/clear_refs'


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ('not enough memory', 'allocate memory', 'out of memory')  # PyTorch's CPU allocator and libraries say so
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
    """The most by which a step raises the memory in use, in bytes; None where that cannot be measured.

    The step must have run before. On the CPU it is the memory of the process, as the system sees it: with what the
    allocator and libraries need beyond the tensors. It is right within some 10 MB, up to 40 MB where other models ran
    before in this process.
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
        before = resident_bytes()
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
    except (AttributeError, OSError, TypeError):
        return None
    step()
    return max(0, peak_resident_bytes() - before)


def resident_bytes() -> int:
    """Memory that this process holds, by Linux's own figure."""
    return _status_bytes('VmRSS')


def peak_resident_bytes() -> int:
    """The most memory that this process has held; getrusage would count its parent's before the fork, too."""
    return _status_bytes('VmHWM')


def _status_bytes(key: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1]) * 1024
    raise OSError(f'/proc/self/status has no {key}.')
