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

DEFAULTS = [group[0] for group in TILES.values()]
ALL_TILES = list(dict.fromkeys(tile for group in TILES.values() for tile in group))


def name_of(tile):
    return 'x'.join(map(str, tile))


def two_strips(tile):
    """Three lines of a strip and a part of one; in 1-D one line of several."""
    strip = tile[0] * tile[1]
    return dict(height=3, width=strip + strip // 4 + 1)


def case(**changes):
    usual = dict(batch=1, height=3, width=5, channels=40, states=1, rank=3, orders=(0, 2), dtype=torch.float32)
    return {**usual, **changes}


SMALL = DEFAULTS[0]
SCANS = {  # what the host code is made to choose, and the inputs
    **{
        f'tile-{name_of(tile)}-{ndim}d': (dict(tile=tile), case(ndim=ndim, **two_strips(tile)))
        for tile in ALL_TILES
        for ndim in (1, 2)
    },
    **{
        f'{str(dtype)[6:]}-tile-{name_of(tile)}-{ndim}d': (
            dict(tile=tile),
            case(ndim=ndim, dtype=dtype, **two_strips(tile)),
        )
        for dtype in (torch.bfloat16, torch.float16)
        for tile, ndim in {(SMALL, 1), *((tile, 2) for tile in DEFAULTS)}
    },
    **{
        f'bands-tile-{name_of(tile)}-{ndim}d': (
            dict(tile=tile, bands=3),
            case(ndim=ndim, height=7, width=two_strips(tile)['width'], orders=(0,)),
        )
        for tile in DEFAULTS
        for ndim in (1, 2)
    },
    'bands-of-columns-bfloat16': (
        dict(bands=2),
        case(batch=2, height=9, width=4, orders=(3, 1), dtype=torch.bfloat16),
    ),
    'four-orders': ({}, case(batch=2, height=4, width=3, orders=(0, 1, 2, 3), channels=64)),
    'four-orders-1d-bfloat16': (
        {},
        case(ndim=1, height=4, width=3, orders=(0, 1, 2, 3), channels=64, dtype=torch.bfloat16),
    ),
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


FUSIONS = {  # maps that a program holds at once, and ones that several do; one row, one column
    torch.float32: ((1, 8, 5, 40), (2, 2, 37, 33), (1, 1, 3, 32), (1, 7, 1, 3)),
    torch.bfloat16: ((2, 2, 37, 33),),
    torch.float16: ((2, 2, 37, 33),),
}


@pytest.mark.parametrize('dtype', FUSIONS, ids=str)
def test_fusion(dtype, emulated):
    for shape in FUSIONS[dtype]:
        assert emulated(cases.fusion, shape, dtype)


def few_lines(tile):
    """Two lines of a strip and a place."""
    return dict(height=2, width=tile[0] * tile[1] + 1)


BARRIERS = {
    **{
        f'{ndim}d-tile-{name_of(tile)}': ('scan', dict(tile=tile), case(ndim=ndim, **few_lines(tile)))
        for tile in DEFAULTS
        for ndim in (1, 2)
    },
    **{
        f'{ndim}d-bands': (
            'scan',
            dict(tile=SMALL, bands=2),
            case(ndim=ndim, **{**few_lines(SMALL), 'height': 4}, orders=(0,)),
        )
        for ndim in (1, 2)
    },
    'fusion': ('fusion', {}, dict(shape=(1, 3, 5, 40), dtype=torch.float32)),
}


@pytest.mark.parametrize(('op', 'options', 'inputs'), BARRIERS.values(), ids=BARRIERS)
def test_every_barrier_is_needed_or_redundant(op, options, inputs, emulated):
    needed, redundant = emulated(cases.barriers, op, options, inputs)
    print(len(needed), 'needed;', 'redundant:', redundant)
    assert op == 'fusion' or needed  # a check that is blind would find none
