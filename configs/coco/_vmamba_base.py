# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-B."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='vmamba_base', drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
