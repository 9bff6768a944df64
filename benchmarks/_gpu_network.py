# SPDX-License-Identifier: Apache-2.0
"""What a network does on a card, found by running it on tensors that have shapes and no values.

An operation takes as long as its products or as the bytes that it reads and writes, whichever is more, at rates that
are stated; those that only look at a tensor otherwise take nothing. Calls of our ops are kept by their arguments.
"""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from _gpu_sm import CHIP
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

# What autocast of CUDA computes in half precision and in float32, as far as these networks call it.
HALF = set(
    'conv1d conv2d conv3d linear matmul __matmul__ mm bmm addmm baddbmm einsum scaled_dot_product_attention'.split()
)
FULL = set('layer_norm group_norm softmax log_softmax softplus exp log pow square rsqrt norm sum cumsum prod'.split())
# Operations that touch no element, and do not say so in their schema.
FREE = set('device _unsafe_view set_ empty empty_like empty_strided new_empty new_empty_strided'.split())
OPS = {
    'vssm::selective_scan': ('scan', 'forward'),
    'vssm::selective_scan_backward': ('scan', 'backward'),
    'vssm::state_fusion': ('fusion', 'forward'),
    'vssm::state_fusion_backward': ('fusion', 'backward'),
}


class Autocast(TorchFunctionMode):
    """Autocast as on CUDA, of tensors that have no device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, '__name__', ''), kwargs or {}
        if name in HALF or name in FULL:
            dtype = self.dtype if name in HALF else torch.float32

            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(dtype) if tensor.is_floating_point() else tensor

            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)


@dataclass
class Cost:
    """What operations of a name cost: how many there are, their bytes and FLOPs, and modelled seconds.

    Of the seconds, `moving` are those of operations that take as long as their bytes.
    """

    count: int = 0
    bytes: float = 0
    flops: float = 0
    seconds: float = 0
    moving: float = 0


@dataclass(frozen=True)
class Like:
    """A tensor's shape, strides and type, and where in its storage it begins."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def end(self) -> int:
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1


@dataclass(frozen=True)
class Call:
    """A call of one of our ops: its schema's name, and its arguments, tensors as `Like`."""

    op: str
    arguments: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arguments[0].shape

    @property
    def elements(self) -> int:
        """Positions times channels, and times the walks of a scan."""
        kind, which = OPS[self.op]
        if kind != 'scan':
            return math.prod(self.shape)
        K, _, N = self.arguments[2 if which == 'forward' else 3].shape
        return math.prod(self.shape) * K * N

    def tensors(self) -> list[Any]:
        """The arguments anew, without values; slices of the same strides are of one tensor, which begins with one."""
        ends: Counter[tuple] = Counter()
        for value in self.arguments:
            if isinstance(value, Like):
                key = value.stride, value.dtype
                ends[key] = max(ends[key], value.end)
        wholes: dict[tuple, Tensor] = {}
        made = []
        for value in self.arguments:
            if isinstance(value, Like):
                key = value.stride, value.dtype
                if value.offset == 0 or key not in wholes:
                    wholes[key] = torch.empty(ends[key], dtype=value.dtype)
                value = wholes[key].as_strided(value.shape, value.stride, value.offset)
            made.append(value)
        return made


def like(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), value.stride(), value.dtype, value.storage_offset())
    return tuple(value) if isinstance(value, list) else value


@dataclass
class Counted:
    """The calls of our ops, and the cost of all else by name."""

    calls: Counter[Call] = field(default_factory=Counter)
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs.values())

    @property
    def by_rate(self) -> dict[str, float]:
        """Seconds by the rate that binds."""
        moving = sum(cost.moving for cost in self.costs.values())
        return dict(elementwise=moving, products=self.seconds - moving)


class Counting(TorchDispatchMode):
    """Counts what is computed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counted()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, schema = func.overloadpacket.__name__, func._schema
        result = as_cudnn(name, args, func(*args, **kwargs))
        if schema.name in OPS:
            self.found.calls[Call(schema.name, tuple(map(like, args)))] += 1
        elif name not in FREE and not is_view(schema):
            cost = self.found.costs.setdefault(name, Cost())
            moved = sum(bytes_of(t) for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            cost.count, cost.bytes, cost.flops = cost.count + 1, cost.bytes + moved, cost.flops + flops
            moving, computing = moved / CHIP['elementwise_tb_per_s'] / 1e12, flops / CHIP['product_tflop_per_s'] / 1e12
            cost.seconds += max(moving, computing)
            cost.moving += moving if moving > computing else 0
        return result


def as_cudnn(name: str, args: tuple, result: Any) -> Any:
    """The result of an operation, which a convolution of channels-last maps, on a card, has channels-last, too."""
    of = dict(convolution=args[:2], convolution_backward=args[1:3]).get(name, ())  # input and weight
    if torch.channels_last not in map(suggest_memory_format, of):
        return result

    def last(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return tree_map_only(Tensor, last, result)


def is_view(schema: Any) -> bool:
    """Whether all that an operation returns is another look at its arguments."""
    return all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the different elements of a tensor."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * math.prod(sizes)


def count_network(name: str, size: int, batch: int, dtype: torch.dtype, train: bool, autocast: bool) -> Counted:
    """What an inference or a training step of a network consists of.

    Args:
        name: timm name.
        size: Side of the images.
        batch: Number of images.
        dtype: What autocast computes in, or else the network itself.
        train: Whether it is a training step, forward and backward.
        autocast: Whether weights and images are in float32, and autocast chooses.
    """
    from vssm.tools._models import create_for_size

    own = torch.float32 if autocast else dtype
    layout = torch.channels_last
    model = create_for_size(name, size).train(train).to('meta', own, memory_format=layout)
    images = torch.empty(batch, 3, size, size, device='meta', dtype=own).contiguous(memory_format=layout)
    on_cuda = mock.patch('vssm.ops.readout.uses_reference', lambda h: True)  # how the readout is computed there
    with on_cuda, Counting() as counting, torch.set_grad_enabled(train):
        with Autocast(dtype) if autocast else nullcontext():
            y = model(images)
            loss = y.square().mean() if train else None
        if loss is not None:
            loss.backward()
    return counting.found
