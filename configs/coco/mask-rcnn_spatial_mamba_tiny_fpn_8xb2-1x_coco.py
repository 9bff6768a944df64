# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-T, COCO, 12 epochs; published: 47.6 / 42.9 box / mask AP."""

_base_ = ['./_spatial_mamba_tiny.py', './_spatial_mamba_1x.py']
