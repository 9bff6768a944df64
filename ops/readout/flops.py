# SPDX-License-Identifier: Apache-2.0
"""What the gated readout costs."""

import math
from collections.abc import Sequence
from typing import Any

from .._register import register_flops


def gated_readout_macs(h: Sequence[int], *args: Any) -> int:
    """Multiply-accumulates of one forward pass: five for each element, as fvcore counts a layer norm.

    That is what a trace of the plain operations comes to as well, for the products and the gate are operations on
    single elements, which fvcore leaves out; so a network costs the same whether it calls the op or the operations.

    Args:
        h: Shape of the fused states, (..., E).
        args: Other arguments of the op, which add nothing.
    """
    return 5 * math.prod(h)


gated_readout_fvcore_macs = register_flops('gated_readout', gated_readout_macs)
