# SPDX-License-Identifier: Apache-2.0
"""The gated readout in plain PyTorch: the definition that every kernel is judged by."""

import torch.nn.functional as F
from torch import Tensor

from ..backend import compute_dtype


def gated_readout_ref(
    h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The gated readout of `vssm.ops.gated_readout`, same arguments, as plain tensor operations.

    Computes in float64 if h is float64, else in float32. Arguments are not checked here.
    """
    dtype, out_dtype = compute_dtype(h), h.dtype
    h, x, C, D, z, weight, bias = (t.to(dtype) for t in (h, x, C, D, z, weight, bias))
    y = F.layer_norm(C * h + D * x, D.shape, weight, bias, eps) * F.silu(z)
    return y.to(out_dtype)
