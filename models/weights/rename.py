# SPDX-License-Identifier: Apache-2.0
"""The names of tensors: from those of published and training files to ours."""

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import timm
from torch import Tensor, nn

from .fit import unfit_numbers

__all__ = ['family_file', 'rename_checkpoint', 'rename_fn', 'strip_prefixes', 'unwrapped']

# Rules for the mixers, which all families share; each family has further ones, which apply first.
_MIXER_RENAMES = (
    (r'\.(op|self_attention)\.', '.mixer.'),
    (r'\.conv2d\.', '.conv.'),
    (r'\.out_norm\.', '.norm.'),
    (r'\.x_proj_weight$', '.x_proj.weight'),
    (r'\.dt_projs(_|\.)weight$', '.dt_weight'),
    (r'\.dt_projs(_|\.)bias$', '.dt_bias'),
    (r'\.A_logs$', '.A_log'),
    (r'\.Ds$', '.D'),
)

# The scan's parameters are stacked over the orders, and convolutions of sequences are 2-D ones of maps of one row;
# published files have the same numbers in other shapes.
_RESHAPED = re.compile(r'\.mixer\.(conv\w*\.weight|(\w+\.)?(x_proj\.weight|dt_weight|dt_bias|A_log|D))$')


def rename_checkpoint(
    state_dict: dict[str, Any],
    model: nn.Module,
    renames: Sequence[tuple[str, str | Callable[[re.Match], str]]],
) -> dict[str, Tensor]:
    """Bring a published checkpoint to our names and shapes; a checkpoint under our names passes unchanged.

    A name that no rule knows, or that would become a name which is there already, is kept, so that a strict load
    reports it.

    Args:
        state_dict: Names and tensors, perhaps under one of the keys state_dict_ema, model_ema, state_dict and model.
        model: The network that the tensors are for.
        renames: Patterns and replacements of the family, in the order in which they apply, before the mixers'.

    Raises:
        ValueError: A tensor of a scan or of its convolution has another number of elements than the model's, or weights
            are not finite real numbers.
    """
    state_dict = unwrapped(state_dict)
    own = model.state_dict()
    if not state_dict.keys() <= own.keys():
        state_dict = _renamed(state_dict, own, renames)
    problems = unfit_numbers(state_dict, own)
    if problems:
        raise ValueError(f'checkpoint must hold the weights of a network, got {problems}.')
    return state_dict


def _renamed(
    state_dict: dict[str, Tensor],
    own: dict[str, Tensor],
    renames: Sequence[tuple[str, str | Callable[[re.Match], str]]],
) -> dict[str, Tensor]:
    out: OrderedDict[str, Tensor] = OrderedDict()
    if hasattr(state_dict, '_metadata'):  # the modules' versions, which load_state_dict reads
        out._metadata = state_dict._metadata  # type: ignore[attr-defined]  # torch's own attribute
    rules = [(re.compile(pattern), replacement) for pattern, replacement in (*renames, *_MIXER_RENAMES)]
    for name, value in state_dict.items():
        ours = name
        if name not in own:
            for rule, replacement in rules:
                ours = rule.sub(replacement, ours)
            if ours in out or ours in state_dict:
                ours = name
        if ours != name and ours in own and _RESHAPED.search(ours):
            if value.numel() != own[ours].numel():
                raise ValueError(
                    f'checkpoint: {name} must hold {own[ours].numel()} numbers for {ours} of shape '
                    f'{tuple(own[ours].shape)}, got {tuple(value.shape)}.'
                )
            value = value.reshape(own[ours].shape)
        out[ours] = value
    return out


def unwrapped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The tensors themselves, of a file that keeps them under a key: averaged ones first, as timm takes them."""
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if key in state_dict:
            return state_dict[key]
    return state_dict


def family_file(model: str) -> ModuleType:
    """The Python module of one of our models."""
    return sys.modules[timm.model_entrypoint(model).__module__]


def rename_fn(model: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """The function that brings published names of one of our models to our names."""
    return family_file(model).checkpoint_filter_fn


# The prefixes of what wraps a network: data parallelism, an average, torch.compile, our ImageClassifier, a detector and
# its adapter.
_PREFIX = re.compile(r'(?:module\.|_orig_mod\.|model\.)*(backbone\.)?(?:_orig_mod\.|model\.)*')


def strip_prefixes(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the network alone, under names without prefixes; and the names of all other tensors."""
    prefixes = {name: match for name in state_dict if (match := _PREFIX.match(name))}  # which matches every name
    has_backbone = any(prefix[1] for prefix in prefixes.values())
    counters = {'steps', 'n_averaged'} if any(name.startswith('module.') for name in state_dict) else set()
    out, left_out = {}, []
    for name, value in state_dict.items():
        ours = name[prefixes[name].end() :]
        if name in counters or has_backbone and not prefixes[name][1]:
            left_out.append(name)
        elif ours in out:
            raise ValueError(f'checkpoint must hold one network, got two tensors that both are {ours}.')
        else:
            out[ours] = value
    return out, left_out
