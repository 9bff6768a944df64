# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-B, COCO, 12 epochs; published: 50.4 / 45.1 box / mask AP."""

_base_ = './_mask-rcnn_1x.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_base', drop_path_rate=0.5),
)
