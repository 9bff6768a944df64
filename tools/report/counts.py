# SPDX-License-Identifier: Apache-2.0
"""Counts of models, which take no clock."""

from collections.abc import Sequence

from .._common import UsageError, load_config
from .._count import DENSE_SHAPES, build_dense, count_fvcore, count_torch, dense_kind, has_open_classes, multiply_adds
from .._models import count_params, create_for_size, image_of
from ..published import IMAGENET_TOP1
from .row import Row


def accuracy_of(name: str) -> float | None:
    return IMAGENET_TOP1.get(name.partition('.')[0])


def count(name: str, size: int | None, depth: int) -> Row:
    """The row of a model with its counts.

    Args:
        name: Name of a model of timm's registry.
        size: Side of the image; None takes the model's own size.
        depth: Number of levels of modules to list.
    """
    row = Row(name, size)
    with row.failing():
        model, image = create_for_size(name, size), image_of(name, size)
        row.size = written_size(image.shape[2:])
        row.published_top1 = accuracy_of(name) if row.size == 224 else None
        row.params = count_params(model)
        cost = count_fvcore(model, image, depth)
        row.activations, row.gmacs, row.modules = cost.activations, cost.macs / 1e9, cost.modules
        if cost.uncounted:
            row.add_note(f'fvcore counts no {", ".join(cost.uncounted)}')
        for op, modules in cost.missed.items():
            row.add_note(f'fvcore counts no {op}, and so misses parameters of {some(modules)}')
        row.gmacs_torch = count_torch(model.to('meta'), image.to('meta')) / 1e9
    return row


def some(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ', '.join(names[:most]) + (f' and {more} more' if more > 0 else '')


def written_size(shape: Sequence[int]) -> int | str:
    height, width = shape
    return height if height == width else f'{height}x{width}'


def count_config(name: str, shape: Sequence[int] | None) -> Row:
    """The row of a config's whole model.

    Args:
        name: Name or path of a config.
        shape: Height and width of the image; None takes those at which papers count.

    Raises:
        UsageError: The config is not of a segmentor or a Mask R-CNN, or leaves its classes open.
    """
    cfg = load_config(name)
    kind = dense_kind(cfg)
    if kind is None:
        raise UsageError(f'--config must be of a segmentor or a Mask R-CNN, got {name}.')
    if has_open_classes(cfg):
        raise UsageError(
            f'--config must have its number of classes, which {name} takes from the data: name the config in the work '
            'dir of its training.'
        )
    shape = shape or DENSE_SHAPES[kind]
    row = Row(name, written_size(shape))
    with row.failing():
        model = build_dense(cfg)
        row.params = count_params(model)
        row.gmacs = multiply_adds(model, shape) / 1e9
        row.gmacs_torch = multiply_adds(model, shape, rules=None) / 1e9
    return row
