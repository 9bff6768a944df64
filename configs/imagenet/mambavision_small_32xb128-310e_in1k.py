# SPDX-License-Identifier: Apache-2.0
"""MambaVision-S, ImageNet-1K, 310 epochs; published: 83.3 top-1."""

_base_ = './_mambavision_32xb128-310e.py'

model = dict(model_name='mambavision_small', drop_path_rate=0.2)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.93)))
test_dataloader = val_dataloader
