# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's state fusion: the public function.

`reference.py` defines it; `op.py` is the operator that PyTorch sees; the kernels are `../csrc/` and `triton.py`.
"""

import torch
from torch import Tensor

from ..backend import check_device, uses_reference, without_autocast
from .check import check_arguments
from .flops import state_fusion_fvcore_macs
from .op import run
from .reference import state_fusion_ref

__all__ = ['state_fusion', 'state_fusion_fvcore_macs', 'state_fusion_ref']


def state_fusion(h: Tensor, weight: Tensor) -> Tensor:
    """Sum a map over three dilated 3x3 neighbourhoods of every position, channel by channel.

    The dilations are 1, 3 and 5; beyond its border the map repeats itself. The kernels sum all three neighbourhoods
    at once, from the weights of each call, in training as in evaluation. Computed in float32, in
    float64 if h is float64. Source: Xiao et al., "Spatial-Mamba" (arXiv:2410.15091), structure-aware state fusion.

    Args:
        h: States, channels last, any strides (contiguous is fast), (batch, H, W, E).
        weight: One 3x3 kernel per dilation and channel, (3, E, 3, 3).

    Returns:
        The fused states, (batch, H, W, E), contiguous, in h's dtype.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device.
        NotImplementedError: h is on a device that has no kernel.

    Example:
        >>> import torch
        >>> from vssm.ops import state_fusion
        >>> h = torch.zeros(1, 11, 11, 1)
        >>> h[0, 5, 5] = 1.0
        >>> y = state_fusion(h, torch.ones(3, 1, 3, 3))
        >>> y[0, 5, :, 0].int().tolist()  # one state reaches its own position three times, and one for each dilation
        [1, 0, 1, 0, 1, 3, 1, 0, 1, 0, 1]
    """
    if not torch.jit.is_tracing():  # where sizes are tensors
        check_arguments(h, weight)
    if uses_reference(h):
        with without_autocast(h):
            return state_fusion_ref(h, weight)
    check_device('state_fusion', h)
    return run(h, weight)
