# SPDX-License-Identifier: Apache-2.0
"""The operators that the models are built on. Imports torch only."""

from .selective_scan import selective_scan, selective_scan_fvcore_macs, use_reference
from .selective_scan_ref import selective_scan_ref

__all__ = ['selective_scan', 'selective_scan_fvcore_macs', 'selective_scan_ref', 'use_reference']
