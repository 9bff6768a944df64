# SPDX-License-Identifier: Apache-2.0
"""What the ops cost, for counters that read a traced graph: fvcore's, and mmengine's, which is made after it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .fusion import state_fusion_fvcore_macs
from .readout import gated_readout_fvcore_macs
from .scan import selective_scan_fvcore_macs

__all__ = ['ACTIVATIONS', 'MACS']

Handle = Callable[[Sequence[Any], Sequence[Any]], int]


def _scan_activations(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """The step sizes of every channel, a matrix product, where the op itself expands them."""
    x, K, dt_weight = inputs[0].type().sizes(), inputs[2].type().sizes()[0], inputs[7]
    return math.prod(x) * K if dt_weight.isCompleteTensor() else 0


def _fusion_activations(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    return 3 * math.prod(inputs[0].type().sizes())  # three convolutions


# By the names of the ops: multiply-accumulates, and the elements that products and convolutions within them give.
MACS: dict[str, Handle] = {
    'vssm::gated_readout': gated_readout_fvcore_macs,
    'vssm::selective_scan': selective_scan_fvcore_macs,
    'vssm::state_fusion': state_fusion_fvcore_macs,
}
ACTIVATIONS: dict[str, Handle] = {
    'vssm::selective_scan': _scan_activations,
    'vssm::state_fusion': _fusion_activations,
}
