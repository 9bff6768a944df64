# SPDX-License-Identifier: Apache-2.0
"""The tiles of a program, and which one a launch takes."""

import functools
from typing import Any

import torch
import triton

WIDE_FROM = 1 << 31  # elements of a map that need offsets of 64 bits
BLOCK_E = 32  # a warp's lanes: with more channels a thread runs out of registers

# Tiles (J, S) for lines of up to so many places, the default first: it leaves every kernel without spills.
TILES = {
    16: ((4, 4), (2, 8), (8, 2)),
    1 << 62: ((4, 8), (4, 16), (8, 8)),
}


def resources(S: int) -> dict[str, int]:
    """The warps of a program and the most registers that its threads can have: the compiler's own choice would spill.

    Nothing is read ahead of time (num_stages = 1), for a walk reads what it has written.
    """
    return dict(num_warps=S, num_stages=1, maxnreg=min(255, 2048 // S))


chosen: dict[tuple, tuple[int, int]] = {}  # the tile of every kind of launch that was tuned


@functools.cache
def autotuned(kernel: triton.JITFunction, tiles: tuple[tuple[int, int], ...]) -> Any:
    """The kernel, which tries some tiles and takes the fastest; the choice is kept on disk.

    Trials do no harm: the first launch of a call adds to nothing, so that a trial writes what the launch then writes.
    """
    configs = [triton.Config(dict(J=J, S=S), **resources(S)) for J, S in tiles]
    key = ['NDIM', 'LOW_RANK', 'HAS_C', 'SUMMARY', 'HAS_CARRY', 'kind']
    return triton.autotune(configs, key, cache_results=True)(kernel)


def kind_of(programs: int, processors: int, line: int, rank: int) -> int:
    """A number for what a tile is tuned for beside types and options: how full the device is, lines' length, the rank.

    Each counts in a few classes, so that another image size seldom tunes anything anew.
    """
    load = sum(programs >= limit * processors for limit in (1, 4))
    length = sum(line > limit for limit in (16, 64))
    depth = sum(rank > limit for limit in (0, 8, 32))
    return load + 3 * length + 9 * depth


def processors(device: torch.device) -> int:
    """The least number of programs that a device runs side by side; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1
