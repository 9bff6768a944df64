# SPDX-License-Identifier: Apache-2.0
"""UPerNet on Spatial-Mamba-B, ADE20K, 160k iterations; published: 51.8 / 52.6 mIoU at one scale / at several."""

_base_ = './_spatial_mamba.py'

model = dict(
    backbone=dict(model_name='spatial_mamba_base', drop_path_rate=0.5),
)
