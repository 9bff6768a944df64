# SPDX-License-Identifier: Apache-2.0
"""The steps of a batch norm between which mmcv lets processes share their sums; all maps are (batch, C, positions)."""

from torch import Tensor

from .common import wide

__all__ = [
    'sync_bn_backward_data',
    'sync_bn_backward_param',
    'sync_bn_forward_mean',
    'sync_bn_forward_output',
    'sync_bn_forward_var',
]


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Mean of each channel, written to `mean`, (C,)."""
    mean.copy_(wide(input).mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean square of each channel's distance from `mean`, written to `var`, both (C,)."""
    var.copy_((wide(input) - mean[:, None]).square_().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """The normalized map, scaled and moved, written to `output`.

    Args:
        input: Map, (batch, C, positions).
        mean, var: Statistics of each channel over all processes, (C,).
        weight, bias: Factor and summand of each channel, (C,).
        running_mean, running_var: Averages over the iterations, which take the statistics in, (C,).
        norm: Tensor that gets the map before it is scaled, which the backward pass needs, (batch, C, positions).
        std: Tensor that gets the square root of var + eps, (C,).
        output: Tensor to write to, (batch, C, positions).
        eps: Summand that keeps the root from zero.
        momentum: Share of the new statistics in the averages.
        group_size: Number of processes.
    """
    std.copy_((var + eps).sqrt_())
    norm.copy_(input).sub_(mean[:, None]).div_(std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    count = input.shape[0] * input.shape[2] * group_size
    unbiased = var * (count / (count - 1)) if count > 1 else var
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.mul_(1 - momentum).add_(momentum * new)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Gradients of factor and summand by this process's map, written to `grad_weight` and `grad_bias`, (C,)."""
    grad_weight.copy_((grad_output * norm).sum((0, 2)))
    grad_bias.copy_(wide(grad_output).sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Gradient of the map, written to `grad_input`, by the mean over the processes of factor's and summand's."""
    count = grad_output.shape[0] * grad_output.shape[2]
    along = (norm * grad_weight[:, None]).add_(grad_bias[:, None]).div_(count)
    grad_input.copy_((grad_output - along) * (weight / std)[:, None])
