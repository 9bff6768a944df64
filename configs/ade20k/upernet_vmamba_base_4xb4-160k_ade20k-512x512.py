# SPDX-License-Identifier: Apache-2.0
"""UPerNet on VMamba-B, ADE20K, 160k iterations; published: 51.0 / 51.6 mIoU at one scale / at several."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='vmamba_base', drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
