# SPDX-License-Identifier: Apache-2.0
"""The networks.

Importing this package registers the backbones with timm, and lets the checkpoint files of their papers pass through
timm's `checkpoint_path=`. The networks for slides have a registry of their own.
"""

from .groupmamba import GroupMamba
from .mambavision import MambaVision
from .mil import MIL, MambaMIL, create_mil_model, list_mil_models
from .spatial_mamba import SpatialMamba
from .vim import Vim
from .vmamba import VMamba
from .weights.read import pass_cfg_nodes

__all__ = [
    'GroupMamba',
    'MIL',
    'MambaMIL',
    'MambaVision',
    'SpatialMamba',
    'VMamba',
    'Vim',
    'create_mil_model',
    'list_mil_models',
]

pass_cfg_nodes()
