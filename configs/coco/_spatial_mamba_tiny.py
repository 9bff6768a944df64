# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-T."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_tiny'),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
