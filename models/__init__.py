# SPDX-License-Identifier: Apache-2.0
"""The networks. Importing this package registers the backbones with timm; those for slides have their own registry."""

from .mil import MIL, MambaMIL, create_mil_model, list_mil_models
from .spatial_mamba import SpatialMamba
from .vmamba import VMamba

__all__ = ['MIL', 'MambaMIL', 'SpatialMamba', 'VMamba', 'create_mil_model', 'list_mil_models']
