# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-T."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='vmamba_tiny'),
)
