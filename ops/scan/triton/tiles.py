# SPDX-License-Identifier: Apache-2.0
"""The tiles of a program, and which one a launch takes."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import triton
from filelock import FileLock

from ..._triton import at_most

WIDE_FROM = 1 << 31  # elements of a map that need offsets of 64 bits
BLOCK_E = 32  # a warp's lanes: with more channels a thread runs out of registers

Tile = tuple[int, int, int]  # places of a warp J, warps S, and the most registers of a thread

# Tiles by dimensions of the scan, and for lines of up to so many places; the default first.
TILES: dict[int, dict[int, tuple[Tile, ...]]] = {
    1: {1 << 62: ((8, 4, 128), (8, 2, 168), (4, 4, 128))},
    2: {
        8: ((8, 1, 168), (4, 2, 128)),
        16: ((8, 2, 168), (16, 1, 168)),
        32: ((8, 4, 168), (16, 2, 168)),
        1 << 62: ((8, 4, 168), (16, 4, 168)),
    },
}


def resources(tile: Tile) -> dict[str, int]:
    """What a launch with a tile is given; nothing is read ahead of time (num_stages), for a walk reads what it wrote.

    The compiler's own choice of registers would leave a processor too few warps, and elsewhere spill.
    """
    return dict(num_warps=tile[1], num_stages=1, **at_most(tile[2]))


chosen: dict[tuple, Tile] = {}  # the tile of every kind of launch that was tuned
LONGEST_WAIT = 120.0  # seconds: several times what it takes to compile and time the tiles of a kernel


def tune(
    kernel: triton.JITFunction,
    tiles: Sequence[Tile],
    kind: tuple,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    keywords: dict[str, Any],
) -> Tile:
    """Launch a kernel with the fastest of some tiles, and return that; the choice is kept on disk.

    Of several processes that need one at once, a single one tries the tiles; the others wait, and read what it chose.
    Trials do no harm: the first launch of a call adds to nothing, so that a trial writes what the launch then writes.

    Args:
        kernel: Kernel to launch.
        tiles: Tiles to choose among.
        kind: What the choice is for, the same in all processes.
        grid: Programs of the launch.
        arguments: Arguments of the kernel.
        keywords: Its arguments by name, and how it is launched, but for what a tile brings.
    """
    configs = [triton.Config(dict(J=tile[0], S=tile[1]), **resources(tile)) for tile in tiles]
    key = [name for name in kernel.arg_names if name.isupper() and name not in ('J', 'S')]
    tuner = triton.autotune(configs, [*key, 'kind'], cache_results=True)(kernel)
    with _alone(f'{kernel.__name__} {kind}'):
        tuner[grid](*arguments, **keywords)
    best = tuner.best_config
    return best.kwargs['J'], best.kwargs['S'], best.maxnreg


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """Be the only process that does something, or, after `LONGEST_WAIT`, one of those that no longer wait.

    Every `what` has a lock of its own, and the wait ends: who holds a lock waits for the device, which may wait for
    another process to join a collective operation, and that process for this lock. The system frees the lock of a
    process that ends, whatever ends it. Where files cannot be locked or written, as in a cache that is part of an image
    of a container, nobody waits.
    """
    folder = Path(triton.knobs.cache.dir) / 'vssm'
    lock = FileLock(folder / f'{hashlib.sha256(what.encode()).hexdigest()}.lock', timeout=LONGEST_WAIT)
    with suppress(OSError, NotImplementedError):  # a timeout is the former
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def kind_of(programs: int, processors: int, line: int) -> int:
    """A number for what a tile is tuned for beside types and options: how full the device is, and the lines' length.

    Each counts in a few classes, so that another image size seldom tunes anything anew.
    """
    load = sum(programs >= limit * processors for limit in (1, 4))
    length = sum(line > limit for limit in (8, 16, 32))
    return load + 3 * length


def processors(device: torch.device) -> int:
    """The least number of programs that a device runs side by side; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1
