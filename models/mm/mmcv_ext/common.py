# SPDX-License-Identifier: Apache-2.0
"""What the operators share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ['gradients', 'wide']


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: sums and coordinates in half precision would lose their digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each input of a function, which is computed once more.

    mmcv calls the operators within an autograd function of its own, where nothing is recorded.

    Args:
        function: Differentiable function of the inputs.
        inputs: Its arguments.
        grad_output: Gradient of its result.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad_output, materialize_grads=True)
