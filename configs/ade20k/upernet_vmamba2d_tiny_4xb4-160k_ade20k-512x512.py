# SPDX-License-Identifier: Apache-2.0
"""UPerNet on 2DVMamba-T, ADE20K, 160k iterations; published: 48.6 / 49.3 mIoU at one scale / at several."""

_base_ = './_vmamba2d.py'

model = dict(
    backbone=dict(
        model_name='vmamba2d_tiny',
        init_cfg=dict(checkpoint='work_dirs/imagenet/vmamba2d_tiny_8xb128-300e_in1k/checkpoint.safetensors'),
    ),
)
