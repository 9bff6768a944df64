# SPDX-License-Identifier: Apache-2.0
"""Layers that the image families share, and the shortcuts that make them fast in eager mode on a CPU.

A method is written as the paper has it, and so TorchScript, compilers, exporters and `torch.func` take it. A decorator
gives it a shortcut: another way to the same result, for plain tensors on a CPU alone. The three conditions below say
when a shortcut may be taken.

Feature maps are channels-last, (batch, height, width, channels).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from timm.layers import Mlp as TimmMlp
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..ops import gated_readout
from ..ops.backend import is_transformed

__all__ = ['Blocks', 'Linear', 'Mlp', 'in_chunks', 'in_groups', 'in_one_pass']

_GROUP_BYTES = 5_000_000  # of the widest tensor, for each thread; twice as much in training, which keeps it anyway
_CONV_ROWS = 512  # below, a convolution's preparations cost more than it saves

_linear = F.linear  # to see when another function is put in its place

Method = TypeVar('Method', bound=Callable[..., Any])


def _is_eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors, and nothing looks on that follows or changes single operations."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or (torch._C._is_torch_function_mode_enabled() and _mode_looks_on())
    ) and all(type(t) is Tensor and t.device.type == 'cpu' for t in tensors)


def _mode_looks_on() -> bool:
    """Whether there is a function mode besides `torch.set_default_device`, which is one too."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _is_float32_on_cpu(layer: nn.Module, *tensors: Tensor) -> bool:
    """Whether a layer with a weight and a bias, and what it takes, are plain float32 on a CPU: its parameters are its
    own, neither parametrised nor quantised nor elsewhere, and autocast is off."""
    parameters = layer._parameters
    return (
        _is_eager_on_cpu(*tensors)
        and all(t.dtype == torch.float32 for t in tensors)
        and parameters.keys() == {'weight', 'bias'}
        and all(
            type(p) is nn.Parameter and p.dtype == torch.float32 and p.device.type == 'cpu'
            for p in parameters.values()
            if p is not None
        )
        and not torch.is_autocast_enabled('cpu')
    )


def _is_altered(module: nn.Module) -> bool:
    """Whether calling a module does more, or else, than its class says: hooks, or a `forward` that was replaced on the
    object or on the class, here or in a part of it."""
    return bool(_has_any_global_hook()) or any(
        bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        or 'forward' in vars(m)
        or _is_patched(type(m))
        for m in module.modules()
    )


def _is_patched(kind: type[nn.Module]) -> bool:
    """Whether the `forward` of a class comes from another file than the class, its own or the base, that holds it."""
    owner = next(c for c in kind.__mro__ if 'forward' in vars(c))
    return vars(owner)['forward'].__module__ != owner.__module__


def shortcut(fast: Callable[..., Any]) -> Callable[[Method], Method]:
    """Decorate a method of a module with a faster way to its result.

    TorchScript compiles the method as it is written, but looks up its global names in this file. So a decorated method
    may use torch, Tensor, nn and F, and leaves the calls of our ops to a method that is not decorated.

    Args:
        fast: Function of the same arguments, which returns None where it may not stand in for the method.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def choose(*args: Any, **kwargs: Any) -> Any:
            result = None if kwargs else fast(*args)
            return method(*args, **kwargs) if result is None else result

        return cast(Method, choose)

    return decorate


def in_groups(growth: float = 4.0, tokens: bool = False, while_training: bool = False) -> Callable[[Method], Method]:
    """Decorate a method that maps every image alike, so that on a CPU it takes a few of them at a time.

    What a network works in is tens of megabytes for a batch: it leaves the cache before it is read again, and is fresh
    memory each time, which the system maps and clears page by page. What a group works in stays and serves the next.

    Args:
        growth: Size of the widest tensor within, in multiples of the input's.
        tokens: Whether every token is mapped alike too, so that a group need not be whole images.
        while_training: Whether to take groups in training mode too, where the method must have no batch norm.
    """

    def decorate(method: Method) -> Method:
        def grouped(module: nn.Module, x: Tensor) -> Tensor | None:
            if not _is_eager_on_cpu(x) or (module.training and not while_training):
                return None
            entries = x.flatten(0, -2) if tokens else x
            budget = _GROUP_BYTES * torch.get_num_threads() * (2 if module.training else 1)
            groups = min(len(entries), math.ceil(x.nbytes * growth / budget))
            if groups <= 1 or _is_altered(module) or _mixes(module, tokens):
                return None
            y = torch.cat([method(module, group) for group in entries.tensor_split(groups)])
            return y.unflatten(0, x.shape[:-1]) if tokens else y

        return shortcut(grouped)(method)

    return decorate


def _mixes(module: nn.Module, tokens: bool) -> bool:
    """Whether a part of the module may tell a group from the whole: a batch norm in training mode while the module is
    in evaluation; among tokens, whatever is not known to map each of them alike."""
    if tokens:
        return not all(type(m) in _OF_TOKENS for m in module.children())
    return not module.training and any(m.training and isinstance(m, _BatchNorm) for m in module.modules())


class Blocks(nn.Sequential):
    """Blocks one after the other, on a CPU for a few images at a time."""

    @in_groups()
    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            input = block(input)
        return input


@register_notrace_module  # a node of an FX graph, as PyTorch's own layers are
class Linear(nn.Linear):
    """Linear layer, (..., C) -> (..., C'), in float32 on a CPU computed as the 1x1 convolution that it is.

    PyTorch hands a linear layer to MKL, after a pass that writes the bias. Convolutions it hands to oneDNN, which adds
    the bias on the way.
    """

    def convolve(self, input: Tensor) -> Tensor | None:
        return _convolve(self, input, 1)[0] if _may_convolve(self, input) else None

    @shortcut(convolve)
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


def in_chunks(name: str, chunks: int) -> Callable[[Method], Method]:
    """Decorate a method that splits what a linear layer of the module computes of its input into equal chunks.

    As convolutions each chunk is a tensor of its own, as is its gradient, which need not be put together.

    Args:
        name: Name of the `Linear` in the module.
        chunks: Number of chunks.
    """

    def convolve(module: nn.Module, x: Tensor) -> tuple[Tensor, ...] | None:
        layer = getattr(module, name)
        if type(layer) is not Linear or not _may_convolve(layer, x) or _is_altered(layer):
            return None
        return _convolve(layer, x, chunks)

    return shortcut(convolve)


def _may_convolve(layer: nn.Linear, x: Tensor) -> bool:
    return (
        _is_float32_on_cpu(layer, x)
        and x.numel() >= _CONV_ROWS * x.shape[-1]
        and F.linear is _linear
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _convolve(layer: nn.Linear, x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    x_as_map = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [..., C] -> [1, C, rows, 1]
    weight, bias = layer.weight.view(*layer.weight.shape, 1, 1), layer.bias
    weights: Sequence[Tensor] = (weight,)
    biases: Sequence[Tensor | None] = (bias,)
    if chunks > 1:  # a chunk of one would be copied in the backward
        weights, biases = weight.chunk(chunks), (None,) * chunks if bias is None else bias.chunk(chunks)
    ys = [F.conv2d(x_as_map, w, b) for w, b in zip(weights, biases, strict=True)]
    return tuple(y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1) for y in ys)  # [1, C', rows, 1] -> [..., C']


class Mlp(TimmMlp):
    """timm's MLP of tokens, (..., C), on a CPU for a group of them at a time: its hidden layer is a block's widest map.

    Args:
        dim: Width of the tokens, C.
        hidden_dim: Width of the hidden layer.
    """

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, hidden_dim, device='meta')  # its linear layers, which draw no random numbers, make way
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.fc2 = Linear(hidden_dim, dim, **dd)

    @in_groups(tokens=True, while_training=True)
    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


_OF_TOKENS = (Linear, nn.Dropout, nn.GELU, nn.Identity, nn.Linear)  # what maps every token alike


def _read_out(mixer: Any, h: Tensor, x: Tensor, C: Tensor, z: Tensor) -> Tensor | None:
    if not _is_eager_on_cpu(h, x, C, z):
        return None
    norm, act, D = mixer.norm, mixer.act, mixer.D.squeeze(0)
    if type(norm) is not nn.LayerNorm or type(act) is not nn.SiLU or norm.bias is None:
        return None
    if not _is_float32_on_cpu(norm, h, x, C, z, D) or _is_altered(norm) or _is_altered(act):
        return None
    return gated_readout(h, x, C, D, z, norm.weight, norm.bias, norm.eps)


in_one_pass = shortcut(_read_out)
"""Decorate a mixer's `read_out(h, x, C, z)`, act(z) norm(C h + D x), with the op that does so in one pass where norm is
a layer norm and act is SiLU."""
