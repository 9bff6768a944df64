# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's gated readout: the public function.

`reference.py` defines it; `op.py` is the operator that PyTorch sees; the kernels are in `../csrc/`.
"""

import torch
from torch import Tensor

from ..backend import check_device, compute_dtype, uses_reference, without_autocast
from .check import check_arguments
from .flops import gated_readout_fvcore_macs
from .op import run
from .reference import gated_readout_ref

__all__ = ['gated_readout', 'gated_readout_fvcore_macs', 'gated_readout_ref']


_HALF = (torch.bfloat16, torch.float16)


def gated_readout(
    h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """layer_norm(C h + D x) * silu(z): what follows the state fusion in Spatial-Mamba's mixer, channels last.

    The kernel, for CPUs, makes one pass over the maps. On CUDA there is none: the reference runs there, a few
    operations that a compiler fuses by itself. Computed in float32, in float64 if h is float64. Source: Xiao et al.,
    "Spatial-Mamba" (arXiv:2410.15091), the output equation on the fused states, and the gate.

    Args:
        h: Fused states, any strides (contiguous is fast), (..., E).
        x: Input of the scan that gave the states, (..., E).
        C: Output coefficients, (..., 1).
        D: Skip coefficients, (E,).
        z: Input of the gate, (..., E).
        weight: Weight of the norm, (E,).
        bias: Bias of the norm, (E,).
        eps: Smallest variance of the norm, added to every variance.

    Returns:
        The gated map, (..., E), contiguous, in h's dtype.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device.
        NotImplementedError: h is on a device that has no kernel, CUDA aside.

    Example:
        >>> import torch
        >>> from vssm.ops import gated_readout
        >>> h, x, z = torch.randn(3, 2, 7, 7, 32)
        >>> C, D = torch.randn(2, 7, 7, 1), torch.ones(32)
        >>> norm = torch.nn.LayerNorm(32)
        >>> y = gated_readout(h, x, C, D, z, norm.weight, norm.bias, norm.eps)
        >>> torch.allclose(y, norm(C * h + D * x) * torch.nn.functional.silu(z), atol=1e-5)
        True
    """
    if not torch.jit.is_tracing():  # where sizes are tensors
        check_arguments(h, x, C, D, z, weight, bias)
    if uses_reference(h) or h.is_cuda:
        with without_autocast(h):
            return gated_readout_ref(h, x, C, D, z, weight, bias, eps)
    check_device('gated_readout', h)
    # The kernel takes one dtype for all maps, and computes with parameters that are not rounded to half of float32.
    dtype = compute_dtype(h)
    map_dtype = h.dtype if h.dtype in _HALF and h.dtype == x.dtype == C.dtype == z.dtype else dtype
    h_, x, C, z = (t.to(map_dtype) for t in (h, x, C, z))
    D, weight, bias = (t.to(dtype) for t in (D, weight, bias))
    return run(h_, x, C, D, z, weight, bias, eps).to(h.dtype)
