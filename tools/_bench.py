# SPDX-License-Identifier: Apache-2.0
"""The one timer, and the one description of the machine that its figures were taken on."""

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..version import __version__
from .env import backends

Key = TypeVar('Key', bound=Hashable)


@dataclass
class Timing:
    """A step to time, and what came of it so far: the seconds of one step in each round, or why it failed."""

    step: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    repeats: int = 1  # steps in a turn; the warm-up may raise their number


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
        timings: Steps to time.
        rounds: Number of rounds to keep.
        warmup: Number of rounds to run before them.
        min_seconds: Least length of a turn; a quicker step is repeated within its turn.
        synchronize: Function that waits for the device, called before and after a turn.
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
            if number >= 0:
                timing.seconds.append(seconds)
            elif min_seconds:
                timing.repeats = math.ceil(max(1.0, min_seconds / max(seconds, 1e-9)))


def median_seconds(
    steps: Mapping[Key, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    repeats: int = 1,
    synchronize: Callable[[], Any] = lambda: None,
) -> dict[Key, float]:
    """The median seconds of each of several steps, timed by `time_interleaved`.

    Args:
        steps: Steps to time, by name.
        rounds: Number of rounds to keep.
        warmup: Number of rounds to run before them.
        repeats: Number of steps in a turn, where a single one is too short for the clock.
        synchronize: Function that waits for the device, called before and after a turn.

    Raises:
        RuntimeError: A step failed.
    """
    timings = {name: Timing(step, repeats=repeats) for name, step in steps.items()}
    time_interleaved(timings.values(), rounds, warmup, synchronize=synchronize)
    for name, timing in timings.items():
        if timing.error is not None:
            raise RuntimeError(f'{name} failed: {timing.error}')
    return {name: statistics.median(timing.seconds) for name, timing in timings.items()}


def median_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The median, and half of the interquartile range: half of the values lie about that near the median."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], None
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return middle, (high - low) / 2


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__


def synchronizer(device: torch.device | str) -> Callable[[], None]:
    """A function that waits until a device has done all that it was asked to."""
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == 'cuda' else (lambda: None)


def conditions(device: torch.device | str = 'cpu') -> dict[str, Any]:
    """What a figure depends on besides the options: processor, threads, clock, kernels, versions."""
    device = torch.device(device)
    states = backends()
    kernels = 'reference' if states['reference'].startswith('on') else states[device.type.upper()]
    packages = ['torch', 'timm', 'fvcore']
    if device.type == 'cuda':
        packages.append('triton')
    return dict(
        processor=torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        clock_mhz=_clock_mhz(device),
        kernels=kernels.removeprefix('on: '),
        python=platform.python_version(),
        cuda=torch.version.cuda if device.type == 'cuda' else None,
        tf32=torch.backends.cudnn.allow_tf32 if device.type == 'cuda' else None,  # for convolutions in float32
        vssm=__version__,
        **{package: _version(package) for package in packages},
    )


def describe(conditions: Mapping[str, Any]) -> str:
    """Conditions in a line, without those that do not apply."""
    return ', '.join(f'{key} {value}' for key, value in conditions.items() if value not in (None, False))


def _version(package: str) -> str | None:
    """The installed version; None where there is no such package, as where Triton comes under another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    names = _cpuinfo('model name')
    return names[0] if names else platform.processor() or platform.machine()


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
