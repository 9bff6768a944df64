# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on GroupMamba-T."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='groupmamba_tiny'),
    neck=dict(in_channels=[64, 128, 348, 448]),
)
