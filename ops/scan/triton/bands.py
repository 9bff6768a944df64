# SPDX-License-Identifier: Apache-2.0
"""A walk cut into bands, which programs scan side by side.

The summary of a band is the product of its a and the state that leaves it where none enters. One launch finds the
summaries (SUMMARY), `_stitch` turns them into the states that enter the bands, and a second launch scans the bands from
there (HAS_CARRY).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['half', 'bands', 'size'])
def _stitch(carry_ptr, half, bands, size, BLOCK: tl.constexpr):
    """Turn the states that leave the bands into those that enter them, in place.

    Columns beyond the end of a shorter line hold no meaning; what is made of them here is never used.

    carry_ptr: (2, batch, bands, size), first the products of a over a band, then the states that leave it.
    half: Elements of one of the two.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    ptr = carry_ptr + tl.program_id(1).to(tl.int64) * bands * size + i
    entering = tl.zeros([BLOCK], tl.float32)
    for _ in range(bands):
        product = tl.load(ptr, mask=mask, other=0.0)
        leaving = tl.load(ptr + half, mask=mask, other=0.0)
        tl.store(ptr + half, entering, mask=mask)
        entering = product * entering + leaving
        ptr += size


def choose_bands(programs: int, height: int, width: int, ndim: int, wanted: int) -> int:
    """The number of bands: 1 where there are `wanted` programs without, else enough for several times as many."""
    if programs >= wanted:
        return 1
    most = max(height, width) // 8 if ndim == 2 else height * width // 256
    return max(1, min(4 * wanted // programs, most))
