# SPDX-License-Identifier: Apache-2.0
"""Layers that the image families share, and the shortcuts that make them fast in eager mode on a CPU.

A method is written as the paper has it, and so TorchScript, compilers, exporters and `torch.func` take it. A decorator
gives it a shortcut: another way to the same result, for plain tensors on a CPU alone. The conditions below say when a
shortcut may be taken: where nobody can tell, since nothing looks on, and all that it passes over or cuts into groups is
known and as its file says. In any other case the method runs as it is written, with whole batches.

Feature maps are channels-last, (batch, height, width, channels).
"""

import functools
import math
from collections.abc import Callable, Sequence
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar, cast

import torch
from timm.layers import DropPath, LayerScale
from timm.layers import Mlp as TimmMlp
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..ops import gated_readout
from ..ops.backend import is_transformed

__all__ = ['Blocks', 'Linear', 'Mlp', 'in_chunks', 'in_groups', 'in_one_pass']

_GROUP_BYTES = 5_000_000  # of the widest tensor, for each thread; twice as much in training, which keeps it anyway
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
# Rows and multiply-accumulates of a layer; with fewer, a convolution's preparations cost what it saves. With AVX2 alone
# it is not taken at all: a training step of vmamba2d_tiny took 1.35 times as long, for the gradients of convolutions.
_CONV_LEAST: tuple[float, float] = (math.inf, math.inf) if _CAPABILITY == 'AVX2' else (512, 2**25)
_FUSED_LEAST = 128, 2**22  # as much of oneDNN's own linear layer, which prepares less

Method = TypeVar('Method', bound=Callable[..., Any])


def _is_eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors, and nothing looks on that follows or changes single operations or layers."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._is_torch_function_mode_enabled() and _mode_looks_on())
        or _has_any_global_hook()
        or not all(map(is_, _functions(), _TORCHS))
    ) and all(type(t) is Tensor and t.is_cpu and t.layout == torch.strided and not t.is_nested for t in tensors)


def _mode_looks_on() -> bool:
    """Whether there is a function mode besides `torch.set_default_device`, which is one too."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _functions() -> tuple[Callable, ...]:
    """What calls a layer, and what layers call."""
    return (
        *(nn.Module.__call__, nn.Module._call_impl, F.conv2d, F.linear, F.batch_norm, F.layer_norm, F.rms_norm),
        *(F.dropout, F.gelu, F.relu, F.scaled_dot_product_attention, F.silu),
    )


def _file_of(function: Callable) -> str:
    """Name of the Python module whose code a function is, which `functools.wraps` does not change."""
    return getattr(function, '__globals__', {}).get('__name__', '')


def _is_function(function: Callable) -> bool:
    """Whether a function is one, and no object that says so of itself, as those of wrapt do."""
    return type(function) in (BuiltinFunctionType, FunctionType)


def _is_torchs(function: Callable) -> bool:
    """Whether a function is compiled or stands in a file of `torch.nn`."""
    is_compiled = isinstance(function, BuiltinFunctionType)
    return _is_function(function) and (is_compiled or _file_of(function).startswith('torch.nn.'))


# None for what stood in the place of one of PyTorch's when this was imported.
_TORCHS = tuple(function if _is_torchs(function) else None for function in _functions())


def _is_plain_on_cpu(layer: nn.Module, dtypes: Sequence[torch.dtype], *tensors: Tensor) -> bool:
    """Whether a layer with a weight and a bias, and what it takes, are plain tensors of one of these dtypes on a CPU:
    its parameters are its own, neither parametrised nor quantised nor elsewhere, and autocast is off."""
    parameters, dtype = layer._parameters, tensors[0].dtype
    return (
        _is_eager_on_cpu(*tensors)  # first, for a tracer's tensors can be asked for nothing else
        and dtype in dtypes
        and all(t.dtype == dtype for t in tensors)
        and parameters.keys() == {'weight', 'bias'}
        and all(
            type(p) is nn.Parameter and p.dtype == dtype and p.is_cpu and p.layout == torch.strided
            for p in parameters.values()
            if p is not None
        )
        and not torch.is_autocast_enabled('cpu')
    )


def _is_altered(module: nn.Module) -> bool:
    """Whether calling a module does more, or else, than its class says: hooks, a `forward` that was replaced on the
    object or on the class, a call that was compiled or is the class's own, parameters that are more than tensors."""
    return (
        bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or module._compiled_call_impl is not None
        or type(module).__call__ is not nn.Module.__call__
        or 'forward' in vars(module)
        or any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None)
        or not all(_is_own(vars(c)['forward'], c) for c in type(module).__mro__[:-2] if 'forward' in vars(c))
    )


def _is_own(forward: Callable, kind: type) -> bool:
    """Whether a `forward` of a class is the one in the file of the class, perhaps with a decorator of this file."""
    return _is_function(forward) and _stands_in_file(forward, kind)


@functools.lru_cache(maxsize=256)
def _stands_in_file(forward: Callable, kind: type) -> bool:
    name = f'{kind.__qualname__}.forward'
    return getattr(forward, '__qualname__', '') == name and _file_of(forward) in (kind.__module__, __name__)


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


def in_groups(
    growth: float = 4.0,
    tokens: bool = False,
    while_training: bool = False,
    parts: Sequence[str] = (),
) -> Callable[[Method], Method]:
    """Decorate a method that maps every image alike, so that on a CPU it takes a few of them at a time.

    What a network works in is tens of megabytes for a batch: it leaves the cache before it is read again, and is fresh
    memory each time, which the system maps and clears page by page. What a group works in stays and serves the next.

    Args:
        growth: Size of the widest tensor within, in multiples of the input's.
        tokens: Whether every token is mapped alike too, so that a group need not be whole images.
        while_training: Whether to take groups in training mode too.
        parts: Names of the parts that the method uses, if not the whole module.
    """

    def decorate(method: Method) -> Method:
        def grouped(module: nn.Module, x: Tensor) -> Tensor | None:
            if not _is_eager_on_cpu(x) or (module.training and not while_training):
                return None
            _keep_freed_memory()
            entries = math.prod(x.shape[:-1]) if tokens else len(x)
            budget = _GROUP_BYTES * torch.get_num_threads() * (2 if module.training else 1)
            groups = min(entries, math.ceil(x.nbytes * growth / budget))
            if groups <= 1:
                return None
            used = [getattr(module, name) for name in parts] or [module]
            if not all(_maps_alike(m, tokens) and not _is_altered(m) for part in used for m in part.modules()):
                return None
            y = _take_groups(method, module, (x.flatten(0, -2) if tokens else x).tensor_split(groups))
            return y.unflatten(0, x.shape[:-1]) if tokens else y

        return shortcut(grouped)(method)

    return decorate


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep what one layer frees for the next, once in a process.

    glibc hands freed memory back to the system if it is more than twice the largest block that was freed before; when
    it comes anew, it is mapped and cleared page by page, which can take as long as the layer. So a block is freed here
    of the largest size that glibc learns from, 32 MiB, of which nothing is used.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device='cpu')


def _take_groups(method: Callable[..., Tensor], module: nn.Module, groups: Sequence[Tensor]) -> Tensor:
    return torch.cat([method(module, group) for group in groups])


def _maps_alike(module: nn.Module, tokens: bool) -> bool:
    """Whether a module is known to map every image, or token, by itself, and without random numbers, which groups
    would draw in another order."""
    kind = type(module)
    if kind not in _OF_TOKENS and (tokens or not (kind in _OF_IMAGES or kind.__module__.startswith(f'{__package__}.'))):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return not module.training and module.running_mean is not None
    if isinstance(module, nn.Dropout):
        return not module.training or module.p == 0
    return not (isinstance(module, DropPath) and module.training)


class Blocks(nn.Sequential):
    """Blocks one after the other, on a CPU for a few images at a time."""

    @in_groups()
    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            input = block(input)
        return input


@register_notrace_module  # a node of an FX graph, as PyTorch's own layers are
class Linear(nn.Linear):
    """Linear layer, (..., C) -> (..., C'), on a CPU computed by oneDNN.

    PyTorch hands a linear layer in float32 to MKL, after a pass that writes the bias, which oneDNN adds on the way.
    """

    def multiply(self, input: Tensor) -> Tensor | None:
        ys = _multiply(self, input)
        return None if ys is None else ys[0]

    @shortcut(multiply)
    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript has no super()
            return F.linear(input, self.weight, self.bias)
        return super().forward(input)


def in_chunks(name: str, chunks: int) -> Callable[[Method], Method]:
    """Decorate a method that splits what a linear layer of the module computes of its input into equal chunks.

    From oneDNN each chunk is a tensor of its own, as is its gradient, which need not be put together.

    Args:
        name: Name of the `Linear` in the module.
        chunks: Number of chunks.
    """

    def multiply(module: nn.Module, x: Tensor) -> tuple[Tensor, ...] | None:
        layer = getattr(module, name)
        if type(layer) is not Linear or not _is_eager_on_cpu(x) or _is_altered(layer):
            return None
        return _multiply(layer, x, chunks)

    return shortcut(multiply)


def _multiply(layer: nn.Linear, x: Tensor, chunks: int = 1, act: str = 'none') -> tuple[Tensor, ...] | None:
    """What a linear layer computes, in chunks of channels, by oneDNN; None where it may not, or would not be faster.

    Args:
        layer: Linear layer.
        x: Its input, (..., C).
        chunks: Number of chunks.
        act: Activation that follows, as oneDNN names it, which has no gradient.
    """
    if not _is_plain_on_cpu(layer, _FUSED_DTYPES, x) or not _is_own(nn.Linear.forward, nn.Linear):
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    weight, bias = layer.weight, layer.bias
    if x.shape[-1:] != weight.shape[1:]:
        return None  # PyTorch says what does not fit
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.is_contiguous()):
        return None  # PyTorch expands a bias and heeds its strides; oneDNN reads as many numbers from its first on
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *layer.parameters(recurse=False)))
    is_fused = _HAS_FUSED and not wants_gradient
    least_rows, least_macs = _FUSED_LEAST if is_fused else _CONV_LEAST
    if x.numel() < least_rows * x.shape[-1] or x.numel() * weight.shape[0] < least_macs:
        return None
    if is_fused:
        return _fuse(layer, x, chunks, act)
    return _convolve(layer, x, chunks) if act == 'none' and x.dtype == torch.float32 else None


# PyTorch has oneDNN's linear layer, an activation within, for its compiler and without a derivative; for bfloat16 it
# needs more than AVX2. On other processors than x86 it was not measured.
_HAS_FUSED = _CAPABILITY.startswith('AVX') and hasattr(torch.ops.mkldnn, '_linear_pointwise')
_HAS_HALF = _HAS_FUSED and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_FUSED_DTYPES = (torch.float32, torch.bfloat16) if _HAS_HALF else (torch.float32,)


def _fuse(layer: nn.Linear, x: Tensor, chunks: int, act: str) -> tuple[Tensor, ...]:
    linear = torch.ops.mkldnn._linear_pointwise
    return tuple(linear(x, w, b, act, [], 'none') for w, b in _chunks_of(layer.weight, layer.bias, chunks))


def _convolve(layer: nn.Linear, x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """A linear layer as the 1x1 convolution that it is, which PyTorch hands to oneDNN."""
    x_as_map = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [..., C] -> [1, C, rows, 1]
    weight = layer.weight.view(*layer.weight.shape, 1, 1)
    ys = [F.conv2d(x_as_map, w, b) for w, b in _chunks_of(weight, layer.bias, chunks)]
    return tuple(y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1) for y in ys)  # [1, C', rows, 1] -> [..., C']


def _chunks_of(weight: Tensor, bias: Tensor | None, chunks: int) -> list[tuple[Tensor, Tensor | None]]:
    if chunks == 1:  # a chunk of one would be copied in the backward
        return [(weight, bias)]
    biases: Sequence[Tensor | None] = (None,) * chunks if bias is None else bias.chunk(chunks)
    return list(zip(weight.chunk(chunks), biases, strict=True))


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

    def activate(self, x: Tensor) -> Tensor | None:
        """The MLP with the activation within its first layer, if that is a GELU."""
        fc1, act = self.fc1, self.act
        if not _is_eager_on_cpu(x) or type(fc1) is not Linear or type(act) is not nn.GELU or act.approximate != 'none':
            return None
        if _is_altered(fc1) or _is_altered(act) or not _is_own(TimmMlp.forward, TimmMlp):
            return None
        hidden = _multiply(fc1, x, act='gelu')
        return None if hidden is None else self.drop2(self.fc2(self.norm(self.drop1(hidden[0]))))

    @in_groups(tokens=True, while_training=True)
    @shortcut(activate)
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return super().forward(x)


# What maps every token alike, and what every image, as ours do.
_OF_TOKENS = {LayerScale, Linear, Mlp, nn.Dropout, nn.GELU, nn.Identity, nn.Linear}
_OF_IMAGES = {DropPath, nn.BatchNorm2d, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.ReLU, nn.Sigmoid, nn.SiLU}


def _reads_out_in_one_dtype(*maps: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the operations of a readout give the dtype of its maps, with autocast or without: these have one, and the
    parameters that too, or float32, in which PyTorch's layer norm takes its parameters beside half types."""
    dtype = maps[0].dtype
    return (
        dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(t.dtype == dtype for t in maps)
        and all(p.dtype in (dtype, torch.float32) and p.is_cpu and p.layout == torch.strided for p in parameters)
    )


def _read_out(mixer: Any, h: Tensor, x: Tensor, C: Tensor, z: Tensor) -> Tensor | None:
    if not _is_eager_on_cpu(h, x, C, z) or type(mixer._parameters.get('D')) is not nn.Parameter:
        return None
    norm, act, D = mixer.norm, mixer.act, mixer.D.squeeze(0)
    if type(norm) is not nn.LayerNorm or norm.normalized_shape != h.shape[-1:]:
        return None
    if type(act) is not nn.SiLU or _is_altered(norm) or _is_altered(act):
        return None
    weight, bias = norm._parameters.get('weight'), norm._parameters.get('bias')
    if weight is None or bias is None or weight.dtype != bias.dtype:
        return None
    if not _reads_out_in_one_dtype(h, x, C, z, parameters=(D, weight, bias)):
        return None
    return gated_readout(h, x, C, D, z, weight, bias, norm.eps)


in_one_pass = shortcut(_read_out)
"""Decorate a mixer's `read_out(h, x, C, z)`, act(z) norm(C h + D x), with the op that does so in one pass where norm is
a layer norm and act is SiLU."""
