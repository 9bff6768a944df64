# SPDX-License-Identifier: Apache-2.0
"""The operators that the models are built on. Imports torch only."""

from .backend import use_reference
from .fusion import state_fusion, state_fusion_fvcore_macs, state_fusion_ref
from .readout import gated_readout, gated_readout_fvcore_macs, gated_readout_ref
from .scan import selective_scan, selective_scan_fvcore_macs, selective_scan_ref

__all__ = [
    'gated_readout',
    'gated_readout_fvcore_macs',
    'gated_readout_ref',
    'selective_scan',
    'selective_scan_fvcore_macs',
    'selective_scan_ref',
    'state_fusion',
    'state_fusion_fvcore_macs',
    'state_fusion_ref',
    'use_reference',
]
