# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-S, COCO, 36 epochs at several scales; published: 50.5 / 44.6 box / mask AP."""

_base_ = './_mask-rcnn_ms-3x.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_small', drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
