# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on GroupMamba-B."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='groupmamba_base', drop_path_rate=0.5),
    neck=dict(in_channels=[96, 192, 424, 512]),
)
