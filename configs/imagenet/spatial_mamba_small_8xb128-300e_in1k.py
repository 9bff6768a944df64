# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba-S, ImageNet-1K, 300 epochs; published: 84.6 top-1."""

_base_ = './_spatial_mamba_8xb128-300e.py'

model = dict(model_name='spatial_mamba_small', drop_path_rate=0.3)
custom_hooks = [
    dict(type='EMAHook', ema_type='StateAverage', momentum=1e-4),
    dict(type='MESAHook', weight=1.5),
    dict(type='SafetensorsHook'),
]
