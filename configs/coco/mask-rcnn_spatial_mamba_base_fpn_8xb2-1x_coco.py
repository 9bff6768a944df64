# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-B, COCO, 12 epochs; published: 50.4 / 45.1 box / mask AP."""

_base_ = ['./_spatial_mamba_base.py', './_spatial_mamba_1x.py']
