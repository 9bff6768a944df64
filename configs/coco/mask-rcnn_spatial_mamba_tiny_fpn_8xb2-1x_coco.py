# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-T, COCO, 12 epochs; published: 47.6 / 42.9 box / mask AP."""

_base_ = './_mask-rcnn_1x.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_tiny'),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
