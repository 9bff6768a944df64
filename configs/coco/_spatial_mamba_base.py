# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on Spatial-Mamba-B."""

_base_ = './_mask-rcnn.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_base', drop_path_rate=0.5),
)
