# SPDX-License-Identifier: Apache-2.0
"""UPerNet on 2DVMamba-B, ADE20K, 160k iterations."""

_base_ = './_vmamba2d.py'

model = dict(
    backbone=dict(
        model_name='vmamba2d_base',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='work_dirs/imagenet/vmamba2d_base_8xb128-300e_in1k/checkpoint.safetensors'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
