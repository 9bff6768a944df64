# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-B."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='mambavision_base', drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
