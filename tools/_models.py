# SPDX-License-Identifier: Apache-2.0
"""Models by name: ours, timm's, and those that ours are measured beside."""

import difflib

import timm
import torch
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import Tensor, nn

from ..models.backbone import ALIASES
from ..models.weights import list_models
from ._common import UsageError, did_you_mean
from .published import SOURCES

SIZES = ('tiny', 'small', 'base', 'large')
PEERS = ('swin_tiny_patch4_window7_224', 'convnext_tiny')


def family_of(name: str) -> str:
    """The family of one of our models, as `published.SOURCES` names it."""
    return next(family for family in SOURCES if name.startswith(f'{family}_'))


def _place(name: str) -> tuple[int, int]:
    """The place of a model in a list: families in their order, sizes in theirs."""
    family = family_of(name)
    size = next(size for size in SIZES if name.startswith(f'{family}_{size}'))
    return list(SOURCES).index(family), SIZES.index(size)


OURS = tuple(sorted((name for name in list_models() if not name.startswith('test_')), key=_place))


def find_model(name: str) -> str:
    """One of our models by its name, or by that of the paper's code, with or without a tag.

    Raises:
        UsageError: There is no such model.
    """
    base = name.partition('.')[0]
    base = ALIASES.get(base, base)
    names = list_models()
    if base not in names:
        raise UsageError(
            f'NAME must be one of the models that `vssm info` lists, got {name!r}.{did_you_mean(name, names)}'
        )
    return base


def find_timm_model(name: str) -> str:
    """Any model of timm by its name, ours among them, with or without a tag.

    Raises:
        UsageError: There is no such model or tag.
    """
    base, dot, tag = name.partition('.')
    base = ALIASES.get(base, base)
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
        raise UsageError(f'MODEL must be a model of timm, got {name!r}.{hint}')
    find_cfg(base, tag)
    return base + dot + tag


def find_cfg(name: str, tag: str = '') -> PretrainedCfg:
    """What timm's registry says of a model's weights and images.

    Raises:
        UsageError: The model has no weights of that tag.
    """
    try:
        return resolve_pretrained_cfg(name, tag or None)
    except RuntimeError as error:
        raise UsageError(str(error)) from error


def create_for_size(name: str, size: int | None = None) -> nn.Module:
    """A model with random weights in evaluation mode, for square images of a size or else for its own images."""
    if size is not None and resolve_pretrained_cfg(name).fixed_input_size:
        return timm.create_model(name, img_size=size).eval()
    return timm.create_model(name).eval()


def image_of(name: str, size: int | None = None, device: str = 'cpu') -> Tensor:
    """An empty image as a model takes it, (1, in_chans, H, W)."""
    channels, *own = resolve_pretrained_cfg(name).input_size
    return torch.zeros(1, channels, *((size, size) if size else own), device=device)


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
