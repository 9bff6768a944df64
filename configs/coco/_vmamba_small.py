# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-S."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='vmamba_small', drop_path_rate=0.3),
)
