# SPDX-License-Identifier: Apache-2.0
"""How an op takes part in the transforms of `torch.func`: grad, vmap and what is made of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether such a transform, or forward-mode differentiation, is at work.

    They do not see an autograd that is registered with the dispatcher, but they see an `autograd.Function`.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def make_function(op: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> type:
    """The `autograd.Function` of an op, of the two functions that are registered with the dispatcher too."""
    name = op.overloadpacket.__name__

    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            f'{name}: the kernels have no forward-mode derivative; use `with vssm.ops.use_reference():`.'
        )

    methods = dict(forward=op, setup_context=setup_context, backward=backward, jvp=jvp)
    methods = {key: staticmethod(method) for key, method in methods.items()}
    return type(name, (torch.autograd.Function,), dict(methods, generate_vmap_rule=True))


def register_vmap(op: torch._ops.OpOverload, maps: Sequence[int] = ()) -> None:
    """Give an op its vmap rule: mapped feature maps fold into the batch, with a mapped parameter each has its call.

    Args:
        op: The operator; its results are tensors.
        maps: Which of the arguments are feature maps, (batch, H, W, ...); the one result is such a map too.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size = info.batch_size
        dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]

        def folded(i: int, t: Any) -> Any:  # [batch, ...], the mapped axis anywhere or nowhere -> [size * batch, ...]
            if i not in maps or t is None:
                return t
            return (t.expand(size, *t.shape) if dims[i] is None else t.movedim(dims[i], 0)).flatten(0, 1)

        def taken(i: int, t: Any, index: int) -> Any:
            return t if dims[i] is None else t.select(dims[i], index)

        if all(dim is None or i in maps for i, dim in enumerate(dims)):
            return op(*(folded(i, arg) for i, arg in enumerate(args))).unflatten(0, (size, -1)), 0
        results = [op(*(taken(i, arg, index) for i, arg in enumerate(args))) for index in range(size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(op, rule)
