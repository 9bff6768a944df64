# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-S, COCO, 36 epochs at several scales; published: 50.5 / 44.6 box / mask AP."""

_base_ = ['./_spatial_mamba_small.py', './_spatial_mamba_ms-3x.py']
