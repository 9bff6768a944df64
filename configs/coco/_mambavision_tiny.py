# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-T."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='mambavision_tiny'),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
