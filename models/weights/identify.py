# SPDX-License-Identifier: Apache-2.0
"""The network that tensors belong to, told by their names and shapes."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import timm
from torch import Tensor, nn

from .fit import misfits, shorten
from .rename import family_file, rename_fn

__all__ = ['identify', 'list_models']

# The constructor's arguments that names and shapes of tensors tell, or that change neither.
SHAPE_ARGS = set('in_chans num_classes patch_size embed_dim depth stem_dim dims depths'.split())
SHAPE_ARGS |= set('d_state ssm_ratio mlp_ratio gate patches layer_scale device dtype'.split())
# Those of them in which a family's published sizes differ.
SIZE_ARGS = set('embed_dim depth stem_dim dims depths'.split())
# Those that shapes suggest together, as one number of patches may be that of several grids: a file's notes go before.
GRID_ARGS = {'img_size', 'patch_stride'}


def list_models() -> list[str]:
    """The names of our models in timm's registry."""
    package = __name__.partition('.')[0]
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f'{package}.')]


@functools.cache
def registered(model: str) -> nn.Module:
    return timm.create_model(model, device='meta')


def _scan_ndim(model: str) -> int:
    return max((getattr(module, 'scan_ndim', 1) for module in registered(model).modules()), default=1)


def _sizes(state_dict: dict[str, Tensor]) -> set[tuple[str, int]]:
    """Names with numbers of elements, which are the same in published files and ours, where shapes may differ."""
    return {(name, value.numel()) for name, value in state_dict.items()}


def _kinds(state_dict: dict[str, Tensor]) -> set[str]:
    """Names without their numbers, which tell the kind of a network whatever its depths and widths."""
    return {re.sub(r'\d+', '', name) for name in state_dict}


def args_fn(model: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """The function that tells the constructor's arguments from tensors: `constructor_args` of the model's file, if it
    has one, that of the pyramids otherwise."""
    return getattr(family_file(model), 'constructor_args', constructor_args)


def first_blocks(state_dict: dict[str, Tensor]) -> list[str]:
    """The prefix of the first block of each stage of a pyramid."""
    stages = {int(match[1]) for name in state_dict if (match := re.match(r'stages\.(\d+)\.blocks\.', name))}
    return [f'stages.{i}.blocks.0.' for i in sorted(stages)]


def pyramid_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that all pyramids have, of those that decide names and shapes.

    Raises:
        LookupError: A tensor that tells an argument is missing, or has too few dimensions.
    """
    blocks: dict[int, set[str]] = {}
    for name in state_dict:
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(match[2])
    args: dict[str, Any] = dict(
        in_chans=state_dict['stem.conv1.weight'].shape[1],
        num_classes=state_dict['head.fc.weight'].shape[0] if 'head.fc.weight' in state_dict else 0,
        depths=[len(blocks[i]) for i in sorted(blocks)],  # counted, so that a large number in a name stays a name
    )
    if 'head.norm.weight' not in state_dict:  # the backbone of a detector or segmentor
        args['features_only'] = True
        del args['num_classes']
    return args


def constructor_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that decide names and shapes, from tensors under our names.

    Raises:
        LookupError: A tensor that tells an argument is missing, or has too few dimensions.
        ZeroDivisionError: A tensor is empty.
    """
    first = first_blocks(state_dict)
    dims = [state_dict[f'{prefix}norm1.weight'].shape[0] for prefix in first]

    def ratio(name: str, dim: int) -> float:
        # Widths were rounded down, so that the largest quotient gives them all again.
        return max(state_dict[f'{prefix}{name}'].shape[dim] / width for prefix, width in zip(first, dims, strict=True))

    inner = state_dict[f'{first[0]}mixer.out_proj.weight'].shape[1]
    return dict(
        **pyramid_args(state_dict),
        dims=dims,
        d_state=state_dict[f'{first[0]}mixer.A_log'].numel() // state_dict[f'{first[0]}mixer.D'].numel(),
        ssm_ratio=ratio('mixer.out_proj.weight', 1),
        mlp_ratio=ratio('mlp.fc1.weight', 0) if f'{first[0]}mlp.fc1.weight' in state_dict else 0.0,
        gate=state_dict[f'{first[0]}mixer.in_proj.weight'].shape[0] > inner,
        patches=any(name.endswith('.downsample.reduction.weight') for name in state_dict),
    )


def _of_nearest_file(state_dict: dict[str, Tensor], models: list[str]) -> list[str]:
    """The models of the family's file whose kinds of names are the nearest to the tensors', which the files' small
    networks for tests tell: the whole registry takes seconds to build."""

    def distance(name: str) -> int:
        return len(_kinds(rename_fn(name)(state_dict, nn.Module())) ^ _kinds(registered(name).state_dict()))

    nearest = min((name for name in models if name.startswith('test_')), key=distance)
    return [name for name in models if rename_fn(name) == rename_fn(nearest)]


def identify(state_dict: dict[str, Tensor], model: str | None = None) -> tuple[str, dict[str, Any], list[str]]:
    """The network that tensors belong to, told by names and shapes.

    A 2-D scan and a 1-D scan have the same tensors, so that tensors of either are taken for the model with the 1-D one.

    Args:
        state_dict: Tensors under published names or ours, without any prefix.
        model: Name of one of our models that it must be, with whatever arguments.

    Returns:
        The name of the nearest model; the arguments in which the tensors' network differs from it, for
        `timm.create_model`; and the names of our other models that have the same names and shapes.

    Raises:
        ValueError: No name is known, or the network is not one of ours.
    """
    if model is not None and model not in list_models():
        raise ValueError(f'model must be one of {", ".join(list_models())}, got {model!r}.')
    candidates = [model] if model else _of_nearest_file(state_dict, list_models())
    renamed = rename_fn(candidates[0])(state_dict, nn.Module())
    kinds, sizes = _kinds(renamed), _sizes(renamed)

    def distance(name: str) -> tuple[int, int, int]:
        own = registered(name).state_dict()
        return len(kinds ^ _kinds(own)), len(sizes ^ _sizes(own)), _scan_ndim(name)

    nearest = min(candidates, key=distance)
    own = registered(nearest).state_dict()
    if not renamed.keys() & own.keys():
        raise ValueError(
            f'checkpoint must hold {model or "one of our networks"}, got {len(state_dict)} tensors of which no name is '
            f'known: {shorten(list(state_dict))}.'
        )
    if len(renamed) > 16 * len(own):  # a network of as many blocks as there are names would be built
        raise ValueError(f'checkpoint must hold one of our networks, got {len(state_dict)} tensors.')
    try:
        args = args_fn(nearest)(renamed)
    except (LookupError, ZeroDivisionError):
        renamed = rename_fn(nearest)(state_dict, registered(nearest))
        raise ValueError(
            f'checkpoint must hold {model or "one of our networks"}, got {len(state_dict)} tensors; of {nearest}, the '
            f'nearest, {misfits(renamed, own)}.'
        ) from None
    takes = inspect.signature(type(registered(nearest))).parameters.keys() | {'features_only'}
    defaults = args_fn(nearest)(own)
    args = {key: value for key, value in args.items() if key in takes and value != defaults.get(key)}
    twins = [name for name in candidates if name != nearest and _sizes(registered(name).state_dict()) == _sizes(own)]
    return nearest, args, twins
