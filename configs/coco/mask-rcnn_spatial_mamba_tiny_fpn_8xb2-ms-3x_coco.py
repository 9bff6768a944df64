# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-T, COCO, 36 epochs at several scales; published: 49.3 / 43.6 box / mask AP."""

_base_ = ['./_spatial_mamba_tiny.py', './_spatial_mamba_ms-3x.py']
