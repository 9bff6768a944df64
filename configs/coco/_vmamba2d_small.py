# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-S."""

_base_ = './_vmamba2d.py'

model = dict(
    backbone=dict(
        model_name='vmamba2d_small',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='work_dirs/imagenet/vmamba2d_small_8xb128-300e_in1k/checkpoint.safetensors'),
    ),
)
