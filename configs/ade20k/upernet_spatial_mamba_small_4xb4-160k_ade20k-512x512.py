# SPDX-License-Identifier: Apache-2.0
"""UPerNet on Spatial-Mamba-S, ADE20K, 160k iterations; published: 50.6 / 51.4 mIoU at one scale / at several."""

_base_ = './_spatial_mamba.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_small', drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
