# SPDX-License-Identifier: Apache-2.0
"""The focal losses of classification: what is right already weighs little."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .common import wide

__all__ = [
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """-a (1 - p) ** gamma * log(p), where p is the probability of the right answer to "is it this class?".

    Args:
        input: Logits, (rows, classes).
        target: Class of each row, (rows,); the number of classes stands for none of them.
        weight: Weight of each class, (classes,), or empty, for one each. Then every row must have a class.
        output: Tensor to write the losses to, (rows, classes).
        gamma: Exponent of the probability of the wrong answer.
        alpha: Factor a of a row's own class; that of the others is 1 - alpha.
    """
    classes = input.shape[1]
    _check('sigmoid_focal_loss', target, classes if weight.numel() == 0 else classes - 1, weight.numel() > 0)
    logits, own = _of_right_answer(input, target)
    loss = logsigmoid(logits)
    loss *= logits.neg_().sigmoid_().pow_(gamma)
    loss *= own.to(loss.dtype).mul_(1 - 2 * alpha).add_(alpha - 1)  # -alpha, or alpha - 1
    output.copy_(_weighted(loss, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of each loss by its logit, written to `grad_input`; otherwise as `sigmoid_focal_loss_forward`."""
    logits, own = _of_right_answer(input, target)
    grad = logsigmoid(logits).mul_(gamma)
    grad *= logits.sigmoid()
    wrong = logits.neg_().sigmoid_()
    grad -= wrong
    grad *= wrong.pow_(gamma)
    grad *= own.to(grad.dtype).add_(alpha - 1)  # alpha, or -(1 - alpha), as the logit then has the other sign
    grad_input.copy_(_weighted(grad, target, weight))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """-alpha (1 - p) ** gamma * log(p), where p is the probability of a row's class.

    Args:
        input: Probabilities, (rows, classes).
        target: Class of each row, (rows,); a negative one has no loss.
        weight: Weight of each class, (classes,), or empty, for one each.
        output: Tensor to write the losses to, (rows,).
        gamma: Exponent of the probability of the other classes.
        alpha: Factor of the loss.
    """
    _check('softmax_focal_loss', target, input.shape[1] - 1)
    p = _of_own_class(input, target)
    loss = -alpha * (1 - p).pow_(gamma) * _log(p)
    output.copy_(_weighted(loss, target.clamp(min=0), weight).masked_fill_(target < 0, 0))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of each row's loss by the logits of all classes, written to `grad_input`, (rows, classes).

    The other arguments are those of `softmax_focal_loss_forward`; `buff` is not used.
    """
    p = _of_own_class(input, target)
    falling = (
        (1 - p).pow_(gamma - 1).mul_(gamma * p * _log(p)).masked_fill_(p == 1, 0)
    )  # of the factor (1 - p) ** gamma
    slope = alpha * (falling - (1 - p).pow_(gamma))
    slope = _weighted(slope, target.clamp(min=0), weight).masked_fill_(target < 0, 0)
    grad = -wide(input) * slope[:, None]
    grad.scatter_add_(1, target.clamp(min=0)[:, None], slope[:, None])
    grad_input.copy_(grad)


def _check(name: str, target: Tensor, most: int, of_some: bool = False) -> None:
    """Refuse targets that mmcv's kernels would read beyond their tensors for."""
    if target.numel() == 0:
        return
    low, high = target.min().item(), target.max().item()
    if high > most or (of_some and low < 0):
        raise ValueError(f'{name}: target must be at most {most}, got {low} to {high}.')


def _of_right_answer(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of "it is" for a row's own class and of "it is not" for the others, and which classes are own."""
    own = target[:, None] == torch.arange(input.shape[1], device=input.device)
    x = wide(input)
    return torch.where(own, x, -x), own


def _of_own_class(probabilities: Tensor, target: Tensor) -> Tensor:
    return wide(probabilities.gather(1, target.clamp(min=0)[:, None]).squeeze(1))


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(torch.float32).tiny).log()  # which is finite where the probability vanished


def _weighted(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The values times the weight of each row's class."""
    if weight.numel() == 0:
        return values
    return values * weight[target].reshape(-1, *[1] * (values.dim() - 1))
