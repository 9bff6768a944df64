# SPDX-License-Identifier: Apache-2.0
"""Layers that the image families share, and the two habits that make them fast on a CPU.

Feature maps are channels-last, (batch, height, width, channels).
"""

import math
from collections.abc import Callable

import torch
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._register import is_transformed

__all__ = ['Mlp', 'in_groups', 'is_plain', 'linear', 'linear_chunks']

_GROUP_BYTES = 5_000_000  # of the widest tensor, for each thread; twice as much in training, which keeps it anyway
_CONV_ROWS = 512  # below, a convolution's preparations cost more than it saves


def in_groups(
    module: nn.Module,
    x: Tensor,
    growth: float = 4.0,
    forward: Callable[[Tensor], Tensor] | None = None,
    while_training: bool = False,
) -> Tensor:
    """module(x), on a CPU a few entries of the first axis at a time.

    What a network works in is tens of megabytes for a batch: it leaves the cache before it is read again, and is fresh
    memory each time, which the system maps and clears page by page. What a group works in stays and serves the next.
    Only for what maps each entry alike in any company. Hooks, compilers, exporters and `torch.func` get whole batches.

    Args:
        module: What to call.
        x: Its input, (entries, ...).
        growth: How many times as large as x the widest tensor within is.
        forward: What to call instead, where module itself is calling.
        while_training: Also in training mode, where a batch norm would tell.
    """
    if forward is None:
        forward = module
    if not _is_eager_on_cpu(x) or (module.training and not while_training):
        return forward(x)
    budget = _GROUP_BYTES * torch.get_num_threads() * (2 if module.training else 1)
    groups = min(len(x), math.ceil(x.nbytes * growth / budget))
    if groups <= 1 or _is_watched(module):
        return forward(x)
    return torch.cat([forward(group) for group in x.tensor_split(groups)])


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), see `linear_chunks`."""
    return linear_chunks(layer, x, 1)[0]


def linear_chunks(layer: nn.Module, x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """layer(x) in equal chunks of its channels; a plain linear layer in float32 on a CPU as the convolution that it is.

    PyTorch hands a linear layer to MKL, after a pass that writes the bias. Convolutions it hands to oneDNN, which adds
    the bias on the way. There each chunk is a tensor of its own, as is its gradient, which need not be put together.

    Args:
        layer: The layer, (..., C) -> (..., chunks C').
        x: Its input, (..., C).
        chunks: How many.
    """
    if not (is_plain(layer, nn.Linear, x) and _has_onednn()) or x.numel() < _CONV_ROWS * x.shape[-1]:
        return (layer(x),) if chunks == 1 else layer(x).chunk(chunks, dim=-1)
    x_as_map = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [..., C] -> [1, C, rows, 1]
    weight, bias = layer.weight.view(*layer.weight.shape, 1, 1), layer.bias
    if chunks == 1:  # a chunk of one would be copied in the backward
        weights, biases = (weight,), (bias,)
    else:
        weights, biases = weight.chunk(chunks), (None,) * chunks if bias is None else bias.chunk(chunks)
    ys = [F.conv2d(x_as_map, w, b) for w, b in zip(weights, biases, strict=True)]
    return tuple(y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1) for y in ys)


class Mlp(TimmMlp):
    """timm's MLP of tokens, (..., C), a group of them at a time: its hidden layer is the widest of a block."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return in_groups(self, x.flatten(0, -2), forward=self.forward_tokens, while_training=True).view(x.shape)

    @torch.jit.unused
    def forward_tokens(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(linear(self.fc1, x))))
        return self.drop2(linear(self.fc2, x))


def _is_eager_on_cpu(x: Tensor) -> bool:
    """Whether x is a plain tensor there, and nothing looks on that would record each step."""
    return (
        type(x) is Tensor
        and x.device.type == 'cpu'
        and not (torch.jit.is_tracing() or torch.compiler.is_compiling() or is_transformed())
    )


def is_plain(module: nn.Module, kind: type[nn.Module], x: Tensor) -> bool:
    """Whether what a module of that kind computes in float32 on a CPU may stand in for module(x): it is one and no
    subclass, its parameters are plain too, and neither hooks nor compilers, exporters or autocast look on."""
    return (
        type(module) is kind
        and _is_eager_on_cpu(x)
        and x.dtype == torch.float32
        and all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in module.parameters())
        and not torch.is_autocast_enabled('cpu')
        and not _is_watched(module)
    )


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _is_watched(module: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )
