# SPDX-License-Identifier: Apache-2.0
"""Names: those of published checkpoints, and ours."""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ['rename_checkpoint']

# The mixers' part of the published names; every family begins with its own.
_MIXER_RENAMES = (
    (r'\.(op|self_attention)\.', '.mixer.'),
    (r'\.mixer\.conv2d\.', '.mixer.conv.'),
    (r'\.mixer\.out_norm\.', '.mixer.norm.'),
    (r'\.mixer\.x_proj_weight$', '.mixer.x_proj.weight'),
    (r'\.mixer\.dt_projs(_|\.)weight$', '.mixer.dt_weight'),
    (r'\.mixer\.dt_projs(_|\.)bias$', '.mixer.dt_bias'),
    (r'\.mixer\.A_logs$', '.mixer.A_log'),
    (r'\.mixer\.Ds$', '.mixer.D'),
)


def rename_checkpoint(
    state_dict: dict[str, Any],
    model: nn.Module,
    renames: Sequence[tuple[str, str | Callable[[re.Match], str]]],
) -> dict[str, Tensor]:
    """Bring a published checkpoint to our names and shapes; the model's own names and tensors pass unchanged.

    Names that no rule knows, or that would become a name that is there already, are kept as they are, so that a strict
    load reports them.

    Args:
        state_dict: Names and tensors, or what wraps them: state_dict_ema, model_ema, state_dict or model.
        model: The network that the tensors are for.
        renames: Patterns and replacements of the family, applied in order before those of the mixers.

    Raises:
        ValueError: A tensor of the scan has another number of elements than the model's.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # averaged weights first, as timm takes them
        if wrapper in state_dict:
            state_dict = state_dict[wrapper]
            break

    own = model.state_dict()
    if state_dict.keys() <= own.keys():
        return state_dict
    out = OrderedDict()
    if hasattr(state_dict, '_metadata'):  # the modules' versions, which loading reads
        out._metadata = state_dict._metadata
    for name, value in state_dict.items():
        ours = name
        if name not in own:
            for pattern, replacement in (*renames, *_MIXER_RENAMES):
                ours = re.sub(pattern, replacement, ours)
            if ours in out or ours in state_dict:
                ours = name
        # The scan's parameters are stacked over the orders, published in one layout or another of the same numbers.
        if ours != name and ours in own and re.search(r'\.mixer\.(x_proj\.weight|dt_weight|dt_bias|A_log|D)$', ours):
            if value.numel() != own[ours].numel():
                raise ValueError(
                    f'checkpoint: {name} must hold {own[ours].numel()} numbers for {ours} of shape '
                    f'{tuple(own[ours].shape)}, got {tuple(value.shape)}.'
                )
            value = value.reshape(own[ours].shape)
        out[ours] = value
    return out
