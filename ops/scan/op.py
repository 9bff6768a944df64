# SPDX-License-Identifier: Apache-2.0
"""The selective scan as an operator of PyTorch, `vssm::selective_scan`, and what autocast makes of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._register import register
from ..backend import autocast_is_on, is_transformed, without_autocast
from .reference import selective_scan_ref


def _cuda_kernels() -> tuple[Callable, Callable]:
    from .triton.launch import selective_scan_triton, selective_scan_triton_backward

    return selective_scan_triton, selective_scan_triton_backward


_run_transformed = register('selective_scan', maps=(0, 1, 3, 4), cuda=_cuda_kernels)  # x, dt, B and C


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, *args: Any) -> Tensor:
    """The operator, with all of its arguments."""
    if not is_transformed():
        return torch.ops.vssm.selective_scan(x, dt, A, B, C, *args)
    if autocast_is_on(x):  # the transforms do not see the cast below the dispatcher
        x, dt, B, C = _autocast(x, dt, B, C)
    return _run_transformed(x, dt, A, B, C, *args)


def run_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, *args: Any, **options: Any) -> Tensor:
    """The reference; under autocast it takes what a kernel would, and computes as precisely."""
    if autocast_is_on(x):
        x, dt, B, C = _autocast(x, dt, B, C)
    with without_autocast(x):
        return selective_scan_ref(x, dt, A, B, C, *args, **options)


# ---- autocast: x, dt, B and C alone are cast; A, D, dt_bias and dt_weight keep their precision -----------------------


def _autocast(x: Tensor, dt: Tensor, B: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(x), cast(dt), cast(B), None if C is None else cast(C)


def _register_autocast(key: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, *args: Any) -> Tensor:
        x, dt, B, C = _autocast(x, dt, B, C)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.vssm.selective_scan(x, dt, A, B, C, *args)

    torch.library.impl('vssm::selective_scan', key, func=autocast)


_register_autocast('AutocastCPU')
_register_autocast('AutocastCUDA')
