# SPDX-License-Identifier: Apache-2.0
"""The tiles of a program, and which one a launch takes."""

import functools
from typing import Any

import torch
import triton

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
    nvidia = {} if torch.version.hip else dict(maxnreg=tile[2])  # which other cards' compilers do not know
    return dict(num_warps=tile[1], num_stages=1, **nvidia)


chosen: dict[tuple, Tile] = {}  # the tile of every kind of launch that was tuned


@functools.cache
def autotuned(kernel: triton.JITFunction, tiles: tuple[Tile, ...]) -> Any:
    """The kernel, which tries some tiles and takes the fastest; the choice is kept on disk.

    Trials do no harm: the first launch of a call adds to nothing, so that a trial writes what the launch then writes.
    """
    configs = [triton.Config(dict(J=tile[0], S=tile[1]), **resources(tile)) for tile in tiles]
    key = [name for name in kernel.arg_names if name.isupper() and name not in ('J', 'S')]
    return triton.autotune(configs, [*key, 'kind'], cache_results=True)(kernel)


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
