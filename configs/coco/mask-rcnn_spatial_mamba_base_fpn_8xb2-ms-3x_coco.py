# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-B, COCO, 36 epochs at several scales."""

_base_ = ['./_spatial_mamba_base.py', './_spatial_mamba_ms-3x.py']
