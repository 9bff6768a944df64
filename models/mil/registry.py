# SPDX-License-Identifier: Apache-2.0
"""The networks for slides by their names.

They have a registry of their own: `timm.create_model` and all that is built on it (configurations with an input size,
listings, FLOP counters, feature extractors) presume images, (batch, channels, H, W), which a bag is not.
"""

import warnings
from typing import Any

from .dtfd import DTFDMIL
from .mambamil import SRMambaMIL
from .networks import MIL, MambaMIL
from .s4mil import S4MIL
from .transmil import TransMIL

__all__ = ['create_mil_model', 'current_name', 'list_mil_models']

_MODELS: dict[str, tuple[type[MIL], dict[str, Any]]] = {
    'mamba2d_mil': (MambaMIL, dict(scan_ndim=2)),
    'mamba1d_mil': (MambaMIL, dict(scan_ndim=1)),
    'srmambamil': (SRMambaMIL, dict(rate=10)),
    'mambamil': (SRMambaMIL, dict(rate=None)),
    's4mil': (S4MIL, {}),
    'transmil': (TransMIL, {}),
    'dtfd_mil': (DTFDMIL, {}),
    'attention_mil': (MIL, dict(pool='attention')),
    'mean_mil': (MIL, dict(pool='mean')),
    'max_mil': (MIL, dict(pool='max')),
}
# Names that networks once had, which configs and checkpoints may still hold.
_FORMER = {'mamba_mil': 'mamba1d_mil'}


def list_mil_models() -> list[str]:
    """The names for `create_mil_model`."""
    return list(_MODELS)


def current_name(model_name: Any) -> str | None:
    """The name of a network, also where a former one is given; None for what is no name of a network."""
    name = _FORMER.get(model_name, model_name)
    return name if name in _MODELS else None


def create_mil_model(model_name: str, **kwargs: Any) -> MIL:
    """A network for bags of patches, by its name.

    Args:
        model_name: Name out of `list_mil_models()`.
        kwargs: Keyword arguments of the network's class, such as in_dim and num_classes.

    Raises:
        ValueError: There is no such network.
    """
    name = current_name(model_name)
    if name is None:
        raise ValueError(f'create_mil_model: model_name must be one of {", ".join(_MODELS)}, got {model_name!r}.')
    if name != model_name:
        warnings.warn(
            f"{model_name} is now called {name}, as it is 2DMambaMIL's 1-D variant; the network of the paper MambaMIL "
            'is mambamil.',
            FutureWarning,
            stacklevel=2,
        )
    cls, model_args = _MODELS[name]
    return cls(**{**model_args, **kwargs})
