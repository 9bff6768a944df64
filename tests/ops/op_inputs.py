# SPDX-License-Identifier: Apache-2.0
"""Inputs, layouts and gradients for any op."""

import math

import torch


def values_and_grads(tensors, options, grad_y, op):
    """y and the gradient of every input, for the given gradient of y."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    y = op(**{**tensors, **leaves}, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return y.detach(), dict(zip(leaves, grads, strict=True))


def random_like(y, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)


def convert(tensors, dtype):
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def lay_out(t, layout):
    """The same numbers with other strides; what lies between them is NaN."""
    if t is None or layout == 'contiguous':
        return t
    if layout == 'slice':  # of a wider projection
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), math.nan)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]
    if layout == 'channels-first':
        return t if t.dim() == 1 else t.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == 'transposed':
        return t if t.dim() == 1 else t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == 'step':  # every second element
        wide = t.new_full((*t.shape, 2), math.nan)
        wide[..., 1] = t
        return wide[..., 1]
    if layout == 'offset':  # no vector is aligned
        wide = t.new_full((t.numel() + 1,), math.nan)
        wide[1:] = t.flatten()
        return wide[1:].view(t.shape)
    raise ValueError(layout)


LAYOUTS = ('slice', 'channels-first', 'transposed', 'step', 'offset')
