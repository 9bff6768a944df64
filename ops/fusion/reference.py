# SPDX-License-Identifier: Apache-2.0
"""The state fusion in plain PyTorch: the definition that every kernel is judged by."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import compute_dtype

DILATIONS = (1, 3, 5)


def state_fusion_ref(h: Tensor, weight: Tensor) -> Tensor:
    """The state fusion of `vssm.ops.state_fusion`, same arguments, as padded and dilated convolutions.

    Computes in float64 if h is float64, else in float32. Arguments are not checked here.
    """
    dtype = compute_dtype(h)
    states = h.to(dtype).permute(0, 3, 1, 2)  # [B, H, W, E] -> [B, E, H, W]
    y = torch.zeros_like(states)
    for kernel, dilation in zip(weight.to(dtype), DILATIONS, strict=True):
        padded = F.pad(states, (dilation,) * 4, mode='replicate')
        y = y + F.conv2d(padded, kernel.unsqueeze(1), groups=kernel.shape[0], dilation=dilation)
    return y.permute(0, 2, 3, 1).to(h.dtype)
