# SPDX-License-Identifier: Apache-2.0
"""What all operators tell PyTorch, said once: shapes, derivatives, transforms, CUDA kernels and FLOPs.

The schemas and the CPU kernels are in `csrc/`. All operators have one form, for which everything here is written:

    op(*tensors, *options) -> y, of the shape and dtype of the first tensor
    op_backward(grad_y, *tensors, *options) -> one gradient for each of the tensors, empty for one that is None
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import import_triton, is_transformed


def register(
    name: str, maps: Sequence[int], cuda: Callable[[], tuple[Callable, ...]] | None = None
) -> Callable[..., Tensor]:
    """Complete the operators `vssm::name` and `vssm::name_backward`, of which the library has schemas and CPU kernels.

    Args:
        name: Name of the op.
        maps: Positions of those tensors that are feature maps, (batch, ...); the others are parameters.
        cuda: Imports the CUDA kernels, the forward and the backward function, when the first CUDA tensor arrives.

    Returns:
        The operator as a function that every transform sees, to be called with all arguments in order.
    """
    op: torch._ops.OpOverload = getattr(torch.ops.vssm, name).default
    op_backward: torch._ops.OpOverload = getattr(torch.ops.vssm, f'{name}_backward').default
    num_tensors = len(op_backward._schema.returns)

    def fake(*args: Any) -> Tensor:
        return args[0].new_empty(args[0].shape)

    def fake_backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:num_tensors])

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.options = inputs[num_tensors:]

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = call_backward(grad_y, *tensors, *ctx.options)
        grads = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
        return *grads, *(None for _ in ctx.options)

    def keep_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'{name}: the kernels have no second derivative; use `with vssm.ops.use_reference():`.'
        )

    def no_forward_mode(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            f'{name}: the kernels have no forward-mode derivative; use `with vssm.ops.use_reference():`.'
        )

    torch.library.register_fake(op, fake)
    torch.library.register_fake(op_backward, fake_backward)
    call = _register_autograd(op, setup_context, backward, no_forward_mode)
    call_backward = _register_autograd(op_backward, keep_nothing, no_second_derivative, no_forward_mode)
    _register_vmap(op, maps)
    _register_vmap(op_backward, ())  # whose gradients of the parameters are sums over the batch
    if cuda is not None:
        torch.library.impl(f'vssm::{name}', 'CUDA', func=lambda *args: import_triton(name, cuda)[0](*args))
        torch.library.impl(f'vssm::{name}_backward', 'CUDA', func=lambda *args: import_triton(name, cuda)[1](*args))
    return call


def _register_autograd(
    op: torch._ops.OpOverload, setup_context: Callable, backward: Callable, jvp: Callable
) -> Callable[..., Any]:
    """Give an operator its derivative twice: with the dispatcher, which compilers see, and as an `autograd.Function`,
    which `torch.func` sees. What comes back calls the operator through the one that is needed."""
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    methods = dict(forward=op, setup_context=setup_context, backward=backward, jvp=jvp)
    namespace = {key: staticmethod(cast(Callable, method)) for key, method in methods.items()}
    function: Any = type(
        op.overloadpacket.__name__, (torch.autograd.Function,), dict(namespace, generate_vmap_rule=True)
    )

    def call(*args: Any) -> Any:
        return function.apply(*args) if is_transformed() else op(*args)

    return call


def _register_vmap(op: torch._ops.OpOverload, maps: Sequence[int]) -> None:
    """Give an operator its vmap rule: mapped feature maps are folded into the batch; where a parameter is mapped too,
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

    torch.library.register_vmap(op, rule)


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
        return 4 * macs(*args)

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
