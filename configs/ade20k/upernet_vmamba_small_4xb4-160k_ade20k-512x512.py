# SPDX-License-Identifier: Apache-2.0
"""UPerNet on VMamba-S, ADE20K, 160k iterations; published: 50.6 / 51.2 mIoU at one scale / at several."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='vmamba_small', drop_path_rate=0.3),
)
