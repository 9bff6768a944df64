# SPDX-License-Identifier: Apache-2.0
"""What arguments the selective scan takes."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from .._check import check_shapes, check_tensors


def check_options(ndim: Any, orders: Any, softplus: Any) -> tuple[int, list[int], bool]:
    """The options of the op as the operator takes them, whatever kind of integers came.

    Raises:
        ValueError: One of them is something else; True and False are no integers here.
    """

    def is_integer(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool)

    if not is_integer(ndim) or ndim not in (1, 2):
        raise ValueError(f'selective_scan: ndim must be 1 or 2, got {ndim!r}.')
    is_orders = isinstance(orders, (list, tuple, range)) and all(map(is_integer, orders))
    if not is_orders or len(orders) not in (1, 2, 4) or len({*orders} & {0, 1, 2, 3}) != len(orders):
        raise ValueError(f'selective_scan: orders must be 1, 2 or 4 different ones of 0, 1, 2, 3, got {orders!r}.')
    if not isinstance(softplus, bool):
        raise ValueError(f'selective_scan: softplus must be True or False, got {softplus!r}.')
    return int(ndim), [int(order) for order in orders], softplus


def check_arguments(tensors: Mapping[str, Any], num_orders: int) -> None:
    """Raise a ValueError that names the first argument that does not fit, what was needed and what came.

    Args:
        tensors: All tensors of the op by their names, x first.
        num_orders: Number of walks to take.
    """
    check_tensors('selective_scan', tensors, optional=('C', 'D', 'dt_bias', 'dt_weight'))

    x, A, C, D, dt_weight = (tensors[name] for name in ('x', 'A', 'C', 'D', 'dt_weight'))
    if x.dim() != 4:
        raise ValueError(f'selective_scan: x must be (batch, H, W, E), got {tuple(x.shape)}.')
    if A.dim() != 3:
        raise ValueError(f'selective_scan: A must be (K, E, N), got {tuple(A.shape)}.')
    if dt_weight is not None and dt_weight.dim() != 3:
        raise ValueError(f'selective_scan: dt_weight must be (K, E, R), got {tuple(dt_weight.shape)}.')
    batch, height, width, channels = x.shape
    states = A.shape[2]
    rank = channels if dt_weight is None else dt_weight.shape[2]
    per_channel = (num_orders, channels)
    per_position = (batch, height, width, num_orders)
    expected = dict(
        A=('(K, E, N)', (*per_channel, states)),
        dt_weight=('(K, E, R)', (*per_channel, rank)),
        dt=('(batch, H, W, K, E)' if dt_weight is None else '(batch, H, W, K, R)', (*per_position, rank)),
        B=('(batch, H, W, K, N)', (*per_position, states)),
        C=('(batch, H, W, K, N)', (*per_position, states)),
        D=('(K, E)', per_channel),
        dt_bias=('(K, E)', per_channel),
    )
    check_shapes('selective_scan', tensors, expected, f' and {num_orders} orders')
    for name, t in tensors.items():
        if t is not None and t.numel() == 0:
            raise ValueError(f'selective_scan: {name} must not be empty, got {tuple(t.shape)}.')
    if C is None and (num_orders > 1 or states > 1 or D is not None):
        raise ValueError(
            'selective_scan: without C, which makes y the state itself, one order, one state and no D are needed, got '
            f'K = {num_orders}, N = {states}, D {"absent" if D is None else "given"}.'
        )
