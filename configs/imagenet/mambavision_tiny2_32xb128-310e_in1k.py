# SPDX-License-Identifier: Apache-2.0
"""MambaVision-T2, ImageNet-1K, 310 epochs; published: 82.7 top-1."""

_base_ = './_mambavision_32xb128-310e.py'

model = dict(model_name='mambavision_tiny2', drop_path_rate=0.2)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.98)))
test_dataloader = val_dataloader
