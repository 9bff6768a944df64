# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-S."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_small', drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
