# SPDX-License-Identifier: Apache-2.0
"""The selective scan."""

from .op import selective_scan, selective_scan_fvcore_macs
from .reference import selective_scan_ref

__all__ = ['selective_scan', 'selective_scan_fvcore_macs', 'selective_scan_ref']
