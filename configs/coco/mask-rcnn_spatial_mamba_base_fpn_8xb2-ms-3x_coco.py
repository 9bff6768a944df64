# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-B, COCO, 36 epochs at several scales."""

_base_ = './_mask-rcnn_ms-3x.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_base', drop_path_rate=0.5),
)
