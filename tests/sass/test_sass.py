# SPDX-License-Identifier: Apache-2.0
"""The machine code of the CUDA kernels, as the host code compiles it for an H100, run by the emulator.

In every case values and gradients are held to the reference, and there is no race, no address outside of the tensors,
no read of memory that was not written, and no place that two programs use. An instruction that the emulator does not
know fails the test and is named.
"""

import pytest
import torch

pytest.importorskip('triton')

from sass import cases  # noqa: E402

from vssm.ops.scan.triton.tiles import TILES  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.triton]

PAIR, SINGLE = (0, 1), (0, 2)  # orders of which two go at a time in 2-D, and one
HALF = (torch.bfloat16, torch.float16)
# Tiles by dimensions: all of them, and the default of each length of lines.
OWN_TILES = [
    (ndim, tile)
    for ndim, groups in TILES.items()
    for tile in dict.fromkeys(tile for group in groups.values() for tile in group)
]
DEFAULTS = [(ndim, tile) for ndim, groups in TILES.items() for tile in dict.fromkeys(g[0] for g in groups.values())]
LARGEST = max(OWN_TILES, key=lambda own: own[1][0] * own[1][1])  # which alone has products by four warps together
LONG_DEFAULTS = dict(DEFAULTS)  # those for the longest lines


def name_of(ndim, tile):
    return f'{ndim}d-tile-{tile[0]}x{tile[1]}'


def two_strips(tile):
    """Two lines of a strip and a part of one; in 1-D one line of several."""
    strip = tile[0] * tile[1]
    return dict(height=2, width=strip + strip // 4 + 1)


def case(**changes):
    usual = dict(batch=1, height=3, width=5, channels=40, states=1, rank=3, orders=SINGLE, dtype=torch.float32)
    return {**usual, **changes}


def tile_case(ndim, tile, **changes):
    return dict(tile=tile), case(ndim=ndim, **{**two_strips(tile), 'orders': PAIR if ndim == 2 else SINGLE, **changes})


SCANS = {  # what the host code is made to choose, and the inputs
    **{name_of(*own): tile_case(*own) for own in OWN_TILES if own != LARGEST},
    **{
        f'{str(dtype)[6:]}-{name_of(*LARGEST)}': tile_case(*LARGEST, dtype=dtype, width=40)  # amid a strip and a warp
        for dtype in (torch.float32, torch.bfloat16)
    },
    f'strips-{name_of(*LARGEST)}': tile_case(*LARGEST, orders=(0,)),
    **{f'single-{name_of(*own)}': tile_case(*own, orders=(3,)) for own in DEFAULTS if own[0] == 2},
    **{
        f'{str(dtype)[6:]}-{name_of(*own)}': tile_case(*own, dtype=dtype)
        for dtype in HALF
        for own in LONG_DEFAULTS.items()
    },
    **{
        f'bands-{name_of(*own)}': (dict(tile=own[1], bands=3), tile_case(*own, height=7, orders=(0,))[1])
        for own in LONG_DEFAULTS.items()
    },
    # A square: of lines that are shorter than the others, `_stitch` also reads what lies beyond them and says nothing.
    'bands-pair': (dict(bands=2), case(height=9, width=9, orders=PAIR)),
    'bands-of-columns-bfloat16': (
        dict(bands=2),
        case(batch=2, height=9, width=4, orders=(3, 1), dtype=torch.bfloat16),
    ),
    'four-orders': ({}, case(batch=2, height=4, width=3, orders=(0, 1, 2, 3), channels=64)),
    'four-orders-1d-bfloat16': (
        {},
        case(ndim=1, height=4, width=3, orders=(0, 1, 2, 3), channels=64, dtype=torch.bfloat16),
    ),
    'large-steps': ({}, case(large_steps=True, orders=(1,))),
    'one-place': ({}, case(height=1, width=1, channels=3)),
    'three-states-rank-17': ({}, case(states=3, rank=17, orders=(1, 2))),
    'full-steps': ({}, case(rank=None, orders=(1, 3))),
    'full-steps-no-softplus-1d': ({}, case(ndim=1, rank=None, softplus=False, has_D=False, orders=(2, 3))),
    'no-C-1d': ({}, case(ndim=1, height=4, has_C=False, has_D=False, orders=(0,), dtype=torch.bfloat16)),
    'no-C-2d': ({}, case(has_C=False, has_D=False, has_bias=False, orders=(3,))),
    '64-bit-offsets': (dict(wide=True), case(batch=2, orders=(3, 0))),
}


@pytest.mark.parametrize(('options', 'inputs'), SCANS.values(), ids=SCANS)
def test_scan(options, inputs, emulated):
    assert emulated(cases.scan, options, inputs)


FUSIONS = {  # pieces that share rows, and columns beyond the map; one piece; one row, one column
    torch.float32: ((2, 9, 18, 33), (1, 8, 5, 64), (1, 1, 3, 32), (1, 7, 1, 3)),
    torch.bfloat16: ((1, 9, 18, 64),),
    torch.float16: ((1, 9, 18, 64),),
}


@pytest.mark.parametrize('dtype', FUSIONS, ids=str)
def test_fusion(dtype, emulated):
    for shape in FUSIONS[dtype]:
        assert emulated(cases.fusion, shape, dtype)


def few_lines(tile):
    """Two lines of a strip and a place."""
    return dict(height=2, width=tile[0] * tile[1] + 1)


SMALLEST = {ndim: min((t for n, t in DEFAULTS if n == ndim and t[1] > 1), key=lambda t: t[1]) for ndim in TILES}
BARRIERS = {  # with the fewest warps, but several
    **{
        f'bands-{name_of(ndim, tile)}': (
            'scan',
            dict(tile=tile, bands=2),
            case(ndim=ndim, **{**few_lines(tile), 'height': 4}, orders=(0,)),
        )
        for ndim, tile in SMALLEST.items()
    },
    'fusion': ('fusion', {}, dict(shape=(1, 3, 5, 40), dtype=torch.float32)),
}


@pytest.mark.parametrize(('op', 'options', 'inputs'), BARRIERS.values(), ids=BARRIERS)
def test_every_barrier_is_needed_or_redundant(op, options, inputs, emulated):
    needed, redundant = emulated(cases.barriers, op, options, inputs)
    print(len(needed), 'needed;', 'redundant:', redundant)
    assert op == 'fusion' or needed  # a check that is blind would find none
