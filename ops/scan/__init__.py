# SPDX-License-Identifier: Apache-2.0
"""The selective scan, the one op that all networks stand on: the public function.

`reference.py` defines it; `chunked.py` shows how the CUDA kernels cut it into bands; `op.py` is the operator that
PyTorch sees; the kernels are `../csrc/` and `triton/`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import check_device, uses_reference
from .check import check_arguments, check_options
from .flops import selective_scan_fvcore_macs
from .op import run, run_reference
from .reference import selective_scan_ref

__all__ = ['selective_scan', 'selective_scan_fvcore_macs', 'selective_scan_ref']


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    ndim: int = 2,
    orders: Sequence[int] = (0, 1, 2, 3),
    softplus: bool = True,
) -> Tensor:
    """Scan a feature map along up to four walks and sum what they give, in the map's own layout.

    With dt = softplus(raw_dt + dt_bias), a = exp(dt A) and b = dt B x at every position, order, channel and state,
    i the outer and j the inner axis of a walk:

        1-D (Mamba):     h[t] = a[t] h[t-1] + b[t]  over the flattened walk
        2-D (2DMamba):   g[i,j] = a[i,j] g[i,j-1] + b[i,j],  then  h[i,j] = a[i,j] h[i-1,j] + g[i,j]
        y = sum over orders of (sum over states of C h) + D x

    Order 0 walks along the rows, 1 along the columns, 2 and 3 are those reversed. The recurrence is computed in
    float32, in float64 if x is float64. Source: Gu & Dao, "Mamba" (arXiv:2312.00752), section 3; Zhang et al.,
    "2DMamba" (arXiv:2412.00678), section 3.

    Args:
        x: Feature map, channels last, any strides (contiguous is fast), (batch, H, W, E).
        dt: Step sizes before bias and softplus, (batch, H, W, K, E); with `dt_weight` their low-rank form,
            (batch, H, W, K, R).
        A: Decay rates, negative, (K, E, N). Never rounded to half precision.
        B: Input map, (batch, H, W, K, N).
        C: Output map, (batch, H, W, K, N). Without it K = N = 1, D is None and y is the state.
        D: Skip connection, (K, E).
        dt_bias: Bias of the step sizes, (K, E).
        dt_weight: Weight of low-rank step sizes, which the kernel expands, raw_dt = dt_weight @ dt, (K, E, R).
        ndim: Dimensions of the recurrence, 1 or 2.
        orders: Walks to take, K = 1, 2 or 4 different ones of 0, 1, 2, 3, as a list, a tuple or a range.
        softplus: Whether the step sizes pass through softplus.

    Returns:
        y, (batch, H, W, E), contiguous, in x's dtype.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, or the options do not go together.
        NotImplementedError: x is on a device that has no kernel.

    Example:
        >>> import torch
        >>> from vssm.ops import selective_scan
        >>> x = torch.randn(2, 14, 14, 32)  # batch, H, W, E
        >>> A = -torch.ones(4, 32, 1)  # K, E, N
        >>> dt, B, C = torch.randn(2, 14, 14, 4, 32), torch.randn(2, 14, 14, 4, 1), torch.randn(2, 14, 14, 4, 1)
        >>> selective_scan(x, dt, A, B, C, D=torch.ones(4, 32)).shape
        torch.Size([2, 14, 14, 32])
    """
    ndim, orders, softplus = check_options(ndim, orders, softplus)
    if not torch.jit.is_tracing():  # where sizes are tensors
        tensors = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, dt_weight=dt_weight)
        check_arguments(tensors, len(orders))
    if uses_reference(x):
        options = dict(dt_weight=dt_weight, ndim=ndim, orders=orders, softplus=softplus)
        return run_reference(x, dt, A, B, C, D, dt_bias, **options)
    check_device('selective_scan', x)
    return run(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)
