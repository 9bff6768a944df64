# SPDX-License-Identifier: Apache-2.0
"""The operators that the models are built on. Imports torch only."""

from .backend import use_reference
from .selective_scan import selective_scan, selective_scan_fvcore_macs
from .selective_scan_ref import selective_scan_ref
from .state_fusion import state_fusion, state_fusion_fvcore_macs
from .state_fusion_ref import state_fusion_ref

__all__ = [
    'selective_scan',
    'selective_scan_fvcore_macs',
    'selective_scan_ref',
    'state_fusion',
    'state_fusion_fvcore_macs',
    'state_fusion_ref',
    'use_reference',
]
