# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's state fusion."""

from .op import state_fusion, state_fusion_fvcore_macs
from .reference import state_fusion_ref

__all__ = ['state_fusion', 'state_fusion_fvcore_macs', 'state_fusion_ref']
