# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on GroupMamba-S."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='groupmamba_small', drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 348, 512]),
)
