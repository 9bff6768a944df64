# SPDX-License-Identifier: Apache-2.0
"""The state fusion as an operator of PyTorch, `vssm::state_fusion`."""

from collections.abc import Callable

from .._register import register


def _cuda_kernels() -> tuple[Callable, Callable]:
    from .triton import state_fusion_triton, state_fusion_triton_backward

    return state_fusion_triton, state_fusion_triton_backward


run = register('state_fusion', maps=(0,), cuda=_cuda_kernels)
