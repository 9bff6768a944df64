# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-S, COCO, 12 epochs; published: 49.2 / 44.0 box / mask AP."""

_base_ = ['./_spatial_mamba_small.py', './_spatial_mamba_1x.py']
