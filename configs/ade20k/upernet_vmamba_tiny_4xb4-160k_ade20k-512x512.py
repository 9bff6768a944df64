# SPDX-License-Identifier: Apache-2.0
"""UPerNet on VMamba-T, ADE20K, 160k iterations; published: 47.9 / 48.8 mIoU at one scale / at several."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='vmamba_tiny'),
)
