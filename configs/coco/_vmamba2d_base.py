# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-B."""

_base_ = './_vmamba2d.py'

model = dict(
    backbone=dict(
        model_name='vmamba2d_base',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='work_dirs/imagenet/vmamba2d_base_8xb128-300e_in1k/checkpoint.safetensors'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
