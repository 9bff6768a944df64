# SPDX-License-Identifier: Apache-2.0
"""The selective scan as an operator of PyTorch, `vssm::selective_scan`, and its reference under autocast."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._register import cast_for_autocast, register
from ..backend import without_autocast
from .reference import selective_scan_ref


def _cuda_kernels() -> tuple[Callable, Callable]:
    from .triton.launch import selective_scan_triton, selective_scan_triton_backward

    return selective_scan_triton, selective_scan_triton_backward


_MAPS = (0, 1, 3, 4)  # x, dt, B and C, which autocast casts; A, D, dt_bias and dt_weight keep their precision

run = register('selective_scan', maps=_MAPS, cuda=_cuda_kernels, autocast=_MAPS)


def run_reference(*args: Any, **options: Any) -> Tensor:
    """The reference; under autocast it takes what a kernel would, and computes as precisely."""
    args = cast_for_autocast(args, _MAPS)
    with without_autocast(args[0]):
        return selective_scan_ref(*args, **options)
