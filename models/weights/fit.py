# SPDX-License-Identifier: Apache-2.0
"""What keeps tensors from being the weights of a network, in words."""

from collections.abc import Callable, Sequence

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

__all__ = ['adapt_input', 'misfits', 'shorten', 'unfit_numbers']


def misfits(state_dict: dict[str, Tensor], own: dict[str, Tensor], limit: int = 20) -> str:
    """What keeps tensors from being those of a network, in words; '' if nothing does.

    Args:
        state_dict: Names and tensors.
        own: Names and tensors of the network.
        limit: Number of names to list of each kind of misfit.
    """
    problems = dict(
        missing=[name for name in own if name not in state_dict],
        unexpected=[name for name in state_dict if name not in own],
        misshapen=[name for name in own if name in state_dict and own[name].shape != state_dict[name].shape],
    )
    listed = [f'{len(names)} {problem} ({shorten(names, limit)})' for problem, names in problems.items() if names]
    if problems['misshapen']:
        name = problems['misshapen'][0]
        listed.append(f'{name} must be {tuple(own[name].shape)} and is {tuple(state_dict[name].shape)}')
    return ', '.join(filter(None, [*listed, unfit_numbers(state_dict, own, limit)]))


def unfit_numbers(state_dict: dict[str, Tensor], own: dict[str, Tensor], limit: int = 20) -> str:
    """What keeps numbers from being those of a network, in words; '' if nothing does.

    Weights must be finite real numbers, and counters whole ones. A buffer that is infinite in the network itself, as a
    mask is, may be so in the file.

    Args:
        state_dict: Names and tensors, of which those are looked at that the network has, too.
        own: Names and tensors of the network.
        limit: Number of names to list of each kind of misfit.
    """
    # Subclasses, as of quantised and distributed tensors, have numbers of their own, which are not looked at.
    plain = {name: value for name, value in state_dict.items() if type(value) in (Tensor, nn.Parameter)}
    pairs = [(name, value, own[name]) for name, value in plain.items() if name in own]
    listed = []
    unlike = [(name, value, ours) for name, value, ours in pairs if not _is_like(value, ours)]
    if unlike:
        name, value, ours = unlike[0]
        names = shorten([name for name, *_ in unlike], limit)
        listed.append(
            f'{len(unlike)} of other numbers ({names}), {name} must hold {_kind(ours)} and holds {value.dtype}'
        )
    infinite = [name for name, value, ours in pairs if not _is_finite(value) and (ours.is_meta or _is_finite(ours))]
    if infinite:
        listed.append(f'{len(infinite)} that are not finite ({shorten(infinite, limit)})')
    return ', '.join(listed)


def adapt_input(state_dict: dict[str, Tensor], network: nn.Module) -> str:
    """Fit weights for images of three channels to a network for others, in place, as timm does for pretrained ones.

    Args:
        state_dict: Names and tensors.
        network: The network; timm's name the convolutions that see the image.

    Returns:
        What was changed, in words; '' if nothing was.
    """
    own, convs = network.state_dict(), getattr(network, 'pretrained_cfg', {}).get('first_conv') or ()
    notes = []
    for name in [f'{conv}.weight' for conv in ([convs] if isinstance(convs, str) else convs)]:
        value, ours = state_dict.get(name), own.get(name)
        if value is None or ours is None or value.ndim != 4 or value.shape[1] != 3:
            continue
        if ours.ndim != 4 or ours.shape[1] == 3:
            continue
        state_dict[name] = adapt_input_conv(ours.shape[1], value)
        notes.append(f'{name} was fitted from 3 channels to {ours.shape[1]}')
    return ', '.join(notes)


def shorten(names: Sequence[str], limit: int = 20) -> str:
    """The first of some names, for an error."""
    return ', '.join([*names[:limit], *(['...'] if len(names) > limit else [])])


def _is_like(value: Tensor, ours: Tensor) -> bool:
    if _kind(ours) == 'integers' and value.is_floating_point():  # as some convert counters
        return value.is_meta or bool((value.double() == value.double().round()).all())
    return _kind(value) == _kind(ours)


def _kind(value: Tensor) -> str:
    kinds: dict[str, Callable[[Tensor], bool]] = {
        'real numbers': torch.is_floating_point,
        'complex numbers': torch.is_complex,
        'booleans': lambda tensor: tensor.dtype == torch.bool,
    }
    return next((kind for kind, holds in kinds.items() if holds(value)), 'integers')


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return True
    if value.element_size() == 1:  # PyTorch has no isfinite for 8 bits
        value = value.float()
    return bool(value.isfinite().all())
