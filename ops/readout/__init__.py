# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba's gated readout."""

from .op import gated_readout

__all__ = ['gated_readout']
