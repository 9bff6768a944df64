# SPDX-License-Identifier: Apache-2.0
"""What the gated readout costs."""

import math
from collections.abc import Sequence
from typing import Any

from .._register import register_flops


def gated_readout_macs(h: Sequence[int], *args: Any) -> int:
    """Multiply-accumulates of one forward pass: five for each element, as fvcore counts a layer norm.

    A network costs the same whether it calls the op or the plain operations: fvcore leaves out the products and the
    gate, which are operations on single elements, and PyTorch's counter leaves out the norm, too.

    Args:
        h: Shape of the fused states, (..., E).
        args: Other arguments of the op, which add nothing.
    """
    return 5 * math.prod(h)


gated_readout_fvcore_macs = register_flops('gated_readout', gated_readout_macs, in_torch=False)
