# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-S, COCO, 36 epochs at several scales; published: 49.9 / 44.2 box / mask AP."""

_base_ = './_mask-rcnn_ms-3x.py'

model = dict(
    backbone=dict(model_name='vmamba_small'),
)
