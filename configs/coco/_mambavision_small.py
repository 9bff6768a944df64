# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-S."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='mambavision_small'),
)
