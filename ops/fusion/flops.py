# SPDX-License-Identifier: Apache-2.0
"""What the state fusion costs."""

from collections.abc import Sequence

from .._register import register_flops


def state_fusion_macs(h: Sequence[int], weight: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass, as the paper counts them: three times nine taps for each element.

    Args:
        h: Shape of the states, (batch, H, W, E).
        weight: Shape of the weights, (3, E, 3, 3), which adds nothing.
    """
    batch, height, width, channels = h
    return 27 * batch * height * width * channels


state_fusion_fvcore_macs = register_flops('state_fusion', state_fusion_macs)
