# SPDX-License-Identifier: Apache-2.0
"""What all operators tell PyTorch, said once: shapes, devices, derivatives, transforms, autocast and FLOPs.

The schemas and the CPU kernels are in `csrc/`. All operators have one form, for which everything here is written:

    op(*tensors, *options) -> y, of the shape and dtype of the first tensor
    op_backward(grad_y, *tensors, *options, wanted) -> one gradient for each of the tensors, empty for one that is None
                                                       or whose flag in `wanted` is False

All of it is in the dispatcher, so that a compiler, a transform and who calls `torch.ops.vssm` meet the same operator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ._check import check_devices
from .backend import autocast_is_on, import_triton, no_kernel

_LIBRARY = torch.library.Library('vssm', 'IMPL')


def register(
    name: str,
    maps: Sequence[int],
    cuda: Callable[[], tuple[Callable, ...]] | None = None,
    autocast: Sequence[int] = (),
) -> torch._ops.OpOverload:
    """Complete the operators `vssm::name` and `vssm::name_backward`, of which the library has schemas and CPU kernels.

    Args:
        name: Name of the op.
        maps: Positions of those tensors that are feature maps, (batch, ...); the others are parameters.
        cuda: Imports the CUDA kernels, the forward and the backward function, when the first CUDA tensor arrives.
        autocast: Positions of those tensors that autocast casts.

    Returns:
        The operator, to be called with all arguments in order.
    """
    op: torch._ops.OpOverload = getattr(torch.ops.vssm, name).default
    op_backward: torch._ops.OpOverload = getattr(torch.ops.vssm, f'{name}_backward').default
    num_tensors = len(op_backward._schema.returns)

    def fake(*args: Any) -> Tensor:
        return args[0].new_empty(args[0].shape)

    def fake_backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(
            grad_y.new_empty(0) if t is None or not is_wanted else t.new_empty(t.shape)
            for t, is_wanted in zip(args[:num_tensors], args[-1], strict=True)
        )

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.options = inputs[num_tensors:]

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:num_tensors])
        grads = op_backward(grad_y, *ctx.saved_tensors, *ctx.options, wanted)
        grads = (grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
        return *grads, *(None for _ in ctx.options)

    def keep_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'{name}: the kernels have no second derivative; use `with vssm.ops.use_reference():`.'
        )

    _register_devices(op, name, fake, cuda, 0)
    _register_devices(op_backward, name, fake_backward, cuda, 1)
    _register_derivative(op, name, setup_context, backward, _vmap_rule(op, maps), autocast)
    # Its gradients of the parameters are sums over the batch, so that nothing can be folded into that.
    _register_derivative(op_backward, name, keep_nothing, no_second_derivative, _vmap_rule(op_backward, ()))
    return op


# ---- devices ---------------------------------------------------------------------------------------------------------


def _register_devices(
    op: torch._ops.OpOverload, name: str, fake: Callable, cuda: Callable[[], tuple[Callable, ...]] | None, index: int
) -> None:
    """Give an operator its kernels for meta tensors, `fake`, and for CUDA, number `index` of what `cuda` imports.

    They check devices, for the dispatcher hands them a mix, too.
    """
    names = [argument.name for argument in op._schema.arguments]

    def check(args: Sequence[Any]) -> None:
        check_devices(name, {n: arg for n, arg in zip(names, args, strict=False) if isinstance(arg, Tensor)})

    def on_meta(*args: Any) -> Any:
        check(args)
        return fake(*args)

    def on_cuda(*args: Any) -> Any:
        check(args)
        if cuda is None:
            raise no_kernel(name, args[0])
        return import_triton(name, cuda)[index](*args)

    torch.library.register_fake(op, on_meta)
    _LIBRARY.impl(op, on_cuda, 'CUDA')


# ---- derivatives, transforms and autocast ----------------------------------------------------------------------------


def _register_derivative(
    op: torch._ops.OpOverload,
    name: str,
    setup_context: Callable,
    backward: Callable,
    vmap: Callable,
    autocast: Sequence[int] = (),
) -> None:
    """Give an operator its derivative twice, for autograd and for the transforms of `torch.func`, and its cast.

    The transforms know `autograd.Function` alone, and stand before all else: what one of them is handed has been cast.
    Autograd is given its own function, for the other one reads signatures in each call.
    """

    def compute(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def compute_and_save(ctx: Any, *args: Any) -> Any:
        y = compute(*args)
        setup_context(ctx, args, y)
        return y

    def no_forward_mode(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            f'{name}: the kernels have no forward-mode derivative; use `with vssm.ops.use_reference():`.'
        )

    def function(**methods: Callable) -> Any:
        methods |= dict(backward=backward, jvp=no_forward_mode)
        namespace = {key: staticmethod(method) for key, method in methods.items()}
        return type(op.overloadpacket.__name__, (torch.autograd.Function,), namespace)

    recorded = function(forward=compute_and_save)
    transformed = function(forward=compute, setup_context=setup_context, vmap=vmap)

    def on_autograd(*args: Any) -> Any:
        needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        return recorded.apply(*args) if needs_grad or forward_ad._current_level >= 0 else compute(*args)

    def on_transform(*args: Any) -> Any:
        return transformed.apply(*(cast_for_autocast(args, autocast) if autocast else args))

    _LIBRARY.impl(op, on_autograd, 'Autograd')
    _LIBRARY.impl(op, on_transform, 'FuncTorchDynamicLayerFrontMode')
    for key in ('AutocastCPU', 'AutocastCUDA') if autocast else ():
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def on_autocast(*args: Any, keyset: Any = keyset) -> Any:
            args = cast_for_autocast(args, autocast)
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return op(*args)

        _LIBRARY.impl(op, on_autocast, key)


def cast_for_autocast(args: tuple, positions: Sequence[int]) -> tuple:
    """The arguments of an op as autocast has them on the device of the first: those tensors cast, but for float64."""
    if not autocast_is_on(args[0]):
        return args
    dtype = torch.get_autocast_dtype(args[0].device.type)

    def is_cast(i: int, arg: Any) -> bool:
        return i in positions and arg is not None and arg.dtype != torch.float64

    return tuple(arg.to(dtype) if is_cast(i, arg) else arg for i, arg in enumerate(args))


def _vmap_rule(op: torch._ops.OpOverload, maps: Sequence[int]) -> Callable[..., tuple]:
    """The vmap rule of an operator: mapped feature maps are folded into the batch; where a parameter is mapped too,
    the operator is called once for each of its entries."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size = info.batch_size
        dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]

        def folded(i: int, t: Any) -> Any:  # [batch, ...], the mapped axis anywhere or nowhere -> [size * batch, ...]
            if i not in maps or t is None:
                return t
            return (t.expand(size, *t.shape) if dims[i] is None else t.movedim(dims[i], 0)).flatten(0, 1)

        def taken(i: int, t: Any, index: int) -> Any:
            return t if dims[i] is None else t.select(dims[i], index)

        # Rows of a readout need no batch; then there is nothing to fold into.
        has_batch = args[0].dim() - (dims[0] is not None) > 1
        if has_batch and all(dim is None or i in maps for i, dim in enumerate(dims)):
            return op(*(folded(i, arg) for i, arg in enumerate(args))).unflatten(0, (size, -1)), 0
        results = [op(*(taken(i, arg, index) for i, arg in enumerate(args))) for index in range(size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def register_flops(
    name: str, macs: Callable[..., int], in_torch: bool = True
) -> Callable[[Sequence[Any], Sequence[Any]], int]:
    """Tell PyTorch's `FlopCounterMode` what an op costs: two FLOPs for each multiply-accumulate, and the backward pass
    twice the forward, which is its convention for a matrix product; what a kernel computes again is not counted.

    Args:
        name: Name of the op.
        macs: Multiply-accumulates of the forward pass, from the op's arguments with a shape in place of each tensor.
        in_torch: Whether PyTorch's counter counts it. It would count none of the plain operations of some ops.

    Returns:
        The same for fvcore.
    """

    def flops(*args: Any, **kwargs: Any) -> int:
        return 2 * macs(*args)

    def flops_backward(grad_y: Any, *args: Any, **kwargs: Any) -> int:
        *args_of_op, _ = args  # which gradients are wanted makes no difference
        return 4 * macs(*args_of_op)

    if in_torch:
        register_flop_formula(getattr(torch.ops.vssm, name))(flops)
        register_flop_formula(getattr(torch.ops.vssm, f'{name}_backward'))(flops_backward)

    def fvcore_macs(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Multiply-accumulates for fvcore: `FlopCountAnalysis(...).set_op_handle('vssm::...', this)`.

        Args:
            inputs: Arguments of the op in a traced graph (`torch._C.Value`).
            outputs: Results of the op in a traced graph, unused.
        """
        return macs(*(value.type().sizes() if value.isCompleteTensor() else value.toIValue() for value in inputs))

    return fvcore_macs
