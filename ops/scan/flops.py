# SPDX-License-Identifier: Apache-2.0
"""What the selective scan costs."""

from collections.abc import Sequence
from typing import Any

from .._register import register_flops


def selective_scan_macs(
    x: Sequence[int],
    dt: Sequence[int],
    A: Sequence[int],
    B: Sequence[int],
    C: Sequence[int] | None,
    D: Sequence[int] | None,
    dt_bias: Sequence[int] | None,
    dt_weight: Sequence[int] | None,
    ndim: int,
    *args: Any,
) -> int:
    """Multiply-accumulates of one forward pass, as the papers count them.

    Per position, order and channel: 9 N for a 1-D and 15 N for a 2-D scan, less 2 N without C, plus 1 for D, plus R
    for the low-rank step. The arguments are those of the op, with a shape in place of each tensor.
    """
    K, _, N = A
    per_channel = (9 if ndim == 1 else 15) * N
    if C is None:
        per_channel -= 2 * N
    if D is not None:
        per_channel += 1
    if dt_weight is not None:
        per_channel += dt_weight[2]
    batch, height, width, channels = x
    return batch * height * width * K * channels * per_channel


selective_scan_fvcore_macs = register_flops('selective_scan', selective_scan_macs)
