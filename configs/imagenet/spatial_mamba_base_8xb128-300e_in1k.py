# SPDX-License-Identifier: Apache-2.0
"""Spatial-Mamba-B, ImageNet-1K, 300 epochs; published: 85.3 top-1."""

_base_ = './_spatial_mamba_8xb128-300e.py'

model = dict(model_name='spatial_mamba_base', drop_path_rate=0.5)
custom_hooks = [
    dict(type='EMAHook', ema_type='StateAverage', momentum=1e-4),
    dict(type='MESAHook', weight=2.0),
    dict(type='SafetensorsHook'),
]
