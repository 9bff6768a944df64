# SPDX-License-Identifier: Apache-2.0
"""The table of ops that the suite of test_ops.py goes through."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from op_inputs import convert, values_and_grads
from scan_cases import make_case

import vssm.ops


@dataclass(frozen=True, eq=False)
class Op:
    """What the suite must know of an op besides its name."""

    folder: str  # in ops/, and the op's name in the tests' ids
    name: str
    make: Callable[..., tuple[dict[str, Any], dict[str, Any]]]  # tensors by name and options, both in the op's order
    maps: tuple[str, ...]  # feature maps among the tensors; the others are parameters
    costs: dict[str, tuple[dict, int]]  # cases and their multiply-accumulates
    variants: dict[str, dict]  # small cases of all that the options change
    medium: dict  # a case of other sizes, with so many elements that any rounding shows
    large: dict[str, dict]  # cases that are worth several threads
    with_channels: tuple[Callable[[int], dict], ...]  # small cases of that many channels
    with_size: tuple[Callable[[int, int], dict], ...]  # cases of a height and a width, few channels
    optional: tuple[str, ...] = ()  # tensors that may be None
    autocast: tuple[str, ...] = ()  # tensors that autocast casts
    has_cuda: bool = True
    in_torch: bool = True  # whether PyTorch's counter of FLOPs counts it
    # Which tensor an error names where another one has an axis more or less (axis None) or one element more in an axis.
    # Without an entry it is the same one; None is no error.
    blamed: dict[tuple[str, int | None], str | None] = field(default_factory=dict)

    def __str__(self):
        return self.folder

    @property
    def names(self):
        """Names of the tensors, in the op's order."""
        return tuple(self.make()[0])

    @property
    def function(self):
        return getattr(vssm.ops, self.name)

    @property
    def reference(self):
        return getattr(vssm.ops, f'{self.name}_ref')

    @property
    def fvcore_macs(self):
        return getattr(vssm.ops, f'{self.name}_fvcore_macs')

    @property
    def operator(self):
        return getattr(torch.ops.vssm, self.name).default

    @property
    def operator_backward(self):
        return getattr(torch.ops.vssm, f'{self.name}_backward').default

    def called(self, way):
        """The public function, or with the same keywords the operator, called past the function: `way` says which."""
        if way == 'function':
            return self.function
        operator, names = self.operator, [argument.name for argument in self.operator._schema.arguments]

        def call(**kwargs):
            values = (kwargs[name] for name in names)
            return operator(*(list(value) if isinstance(value, tuple) else value for value in values))

        return call

    def values_and_grads(self, tensors, options, grad_y):
        return values_and_grads(tensors, options, grad_y, self.function)


def arguments(tensors, options):
    """All arguments in order, as the operator takes them."""
    return tuple(list(value) if isinstance(value, tuple) else value for value in {**tensors, **options}.values())


def backward_arguments(op, grad_y, tensors, options, wanted=None):
    """All arguments in order, as the backward operator takes them; by default every gradient is wanted."""
    return grad_y, *arguments(tensors, options), [wanted is None or name in wanted for name in op.names]


def make_fusion(batch=2, height=3, width=4, channels=5, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = dict(h=(batch, height, width, channels), weight=(3, channels, 3, 3))
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return convert(tensors, dtype), {}


READOUT_NAMES = ('h', 'x', 'C', 'D', 'z', 'weight', 'bias')


def make_readout(shape=(2, 3, 4, 5), *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = dict(C=(*shape[:-1], 1), **dict.fromkeys(('D', 'weight', 'bias'), shape[-1:]))
    tensors = {n: torch.randn(shapes.get(n, shape), generator=g, dtype=torch.float64) for n in READOUT_NAMES}
    return convert(tensors, dtype), dict(eps=1e-5)


def make_scan(*args, rank=3, **kwargs):
    return make_case(*args, rank=rank, **kwargs)


OPS = (
    Op(
        folder='scan',
        name='selective_scan',
        make=make_scan,
        maps=('x', 'dt', 'B', 'C'),
        optional=('C', 'D', 'dt_bias', 'dt_weight'),
        autocast=('x', 'dt', 'B', 'C'),
        # Positions x orders x channels, then multiply-accumulates for each of them.
        costs={
            '2d-low-rank': (dict(rank=3), (2 * 3 * 4) * 4 * 5 * (15 * 2 + 1 + 3)),
            '1d-low-rank': (dict(rank=3, ndim=1), (2 * 3 * 4) * 4 * 5 * (9 * 2 + 1 + 3)),
            '2d-no-D': (dict(orders=(1, 3), has_D=False, states=16, rank=None), (2 * 3 * 4) * 2 * 5 * (15 * 16)),
            '1d-no-C': (
                dict(orders=(0,), ndim=1, states=1, has_C=False, has_D=False, rank=None),
                (2 * 3 * 4) * 1 * 5 * 7,
            ),
            '2d-no-C': (dict(orders=(2,), states=1, has_C=False, has_D=False, rank=1), (2 * 3 * 4) * 1 * 5 * (13 + 1)),
        },
        variants={
            name: dict(dict(batch=1, height=2, width=3, channels=2, rank=None), **case)
            for name, case in {
                '2d-all-low-rank': dict(rank=2),
                '1d-all-low-rank': dict(rank=2, ndim=1),
                '2d-orders-3-1': dict(orders=(3, 1), has_D=False),
                '1d-orders-1-2': dict(orders=(1, 2), ndim=1, has_D=False, has_bias=False),
                '1d-order-2-no-softplus': dict(orders=(2,), ndim=1, softplus=False, has_bias=False),
                '2d-order-3-no-softplus': dict(orders=(3,), softplus=False),
                '1d-no-C': dict(orders=(0,), ndim=1, states=1, has_C=False, has_D=False),
                '2d-no-C': dict(orders=(1,), states=1, has_C=False, has_D=False, rank=1),
            }.items()
        },
        medium=dict(height=9, width=8, channels=19, rank=2),
        large={f'{n}d': dict(batch=3, height=20, width=21, channels=100, rank=6, ndim=n) for n in (1, 2)},
        with_channels=tuple(
            partial(lambda n, E: dict(batch=1, channels=E, states=n, rank=2, orders=(0, 3), ndim=n), n) for n in (1, 2)
        ),
        with_size=tuple(
            partial(lambda n, H, W: dict(batch=1, height=H, width=W, channels=8, states=1, rank=1, ndim=n), n)
            for n in (1, 2)
        ),
        # The sizes come from x, the rank from dt_weight and the states from A.
        blamed={
            **{('x', axis): 'dt' for axis in (0, 1, 2)},
            **{('x', 3): 'A', ('A', 2): 'B', ('dt_weight', 2): 'dt'},
        },
    ),
    Op(
        folder='fusion',
        name='state_fusion',
        make=make_fusion,
        maps=('h',),
        costs={'map': ({}, 27 * 2 * 3 * 4 * 5)},  # three neighbourhoods of nine
        variants={'map': dict(batch=1, height=7, width=4, channels=3)},
        medium=dict(batch=3, height=5, width=6, channels=8),
        large={'map': dict(batch=3, height=40, width=50, channels=24)},
        with_channels=(lambda E: dict(batch=1, channels=E),),
        with_size=(lambda H, W: dict(batch=1, height=H, width=W, channels=8),),
        blamed={**{('h', axis): None for axis in (0, 1, 2)}, ('h', 3): 'weight'},
    ),
    Op(
        folder='readout',
        name='gated_readout',
        make=make_readout,
        maps=('h', 'x', 'C', 'z'),
        costs={'map': ({}, 5 * 2 * 3 * 4 * 5), 'rows': (dict(shape=(7, 3)), 5 * 7 * 3)},
        variants={'map': dict(shape=(1, 2, 3, 5)), 'rows': dict(shape=(3, 9)), 'one': dict(shape=(4,))},
        medium=dict(shape=(3, 5, 6, 8)),
        large={'map': dict(shape=(3, 40, 50, 24))},
        with_channels=(lambda E: dict(shape=(2, 3, E)),),
        with_size=(lambda H, W: dict(shape=(1, H, W, 8)),),
        has_cuda=False,
        in_torch=False,
        blamed={('h', axis): 'x' for axis in (None, 0, 1, 2, 3)},
    ),
)
