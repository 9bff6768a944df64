# SPDX-License-Identifier: Apache-2.0
"""The checks of arguments that all ops make: a ValueError names the argument, what was needed and what came.

The public functions make them, once for each call. Operators trust them but for devices, since PyTorch itself would
hand a mix of CPU and meta tensors to the rule for meta tensors, whose result has no values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_tensors(op: str, tensors: Mapping[str, Any], optional: Sequence[str] = ()) -> None:
    """Refuse what is no tensor of a floating dtype on the device of the first one.

    Args:
        op: Name of the op, with which a message begins.
        tensors: The op's tensors by their names.
        optional: Names of those that may be None.
    """
    for name, t in tensors.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f'{op}: {name} must be a tensor, got {type(t).__name__}.')
        if not t.is_floating_point():
            raise ValueError(f'{op}: {name} must have a floating dtype, got {t.dtype}.')
    check_devices(op, tensors)


def check_devices(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse a tensor that is on another device than the first one; None passes.

    Args:
        op: Name of the op, with which a message begins.
        tensors: The op's tensors by their names.
    """
    device = None
    for name, t in tensors.items():
        if t is None:
            continue
        if device is None:
            first, device = name, t.device
        elif t.device != device:
            raise ValueError(f'{op}: {name} must be on the device of {first}, {device}, got {t.device}.')


def check_shapes(
    op: str,
    tensors: Mapping[str, Any],
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
    also: str = '',
) -> None:
    """Refuse a tensor whose shape does not follow from the first one's; None passes.

    Args:
        op: Name of the op, with which a message begins.
        tensors: The op's tensors by their names.
        expected: The axes, in words, and the shape that each tensor must have.
        also: What the shapes follow from besides, as the end of a message has it.
    """
    for name, (axes, shape) in expected.items():
        t = tensors[name]
        if t is not None and tuple(t.shape) != shape:
            first, x = next(iter(tensors.items()))
            raise ValueError(
                f'{op}: {name} must be {axes} = {shape} for {first} of shape {tuple(x.shape)}{also}, got '
                f'{tuple(t.shape)}.'
            )
