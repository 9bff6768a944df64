# SPDX-License-Identifier: Apache-2.0
"""The networks. Importing this package registers every one of them with timm."""

from .spatial_mamba import SpatialMamba
from .vmamba import VMamba

__all__ = ['SpatialMamba', 'VMamba']
