# SPDX-License-Identifier: Apache-2.0
"""UPerNet on Spatial-Mamba-T, ADE20K, 160k iterations; published: 48.6 / 49.4 mIoU at one scale / at several."""

_base_ = './_spatial_mamba.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_tiny'),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
