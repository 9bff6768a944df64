# SPDX-License-Identifier: Apache-2.0
"""MambaVision-B, ImageNet-1K, 310 epochs; published: 84.2 top-1."""

_base_ = './_mambavision_32xb128-310e.py'

model = dict(model_name='mambavision_base', drop_path_rate=0.3)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
