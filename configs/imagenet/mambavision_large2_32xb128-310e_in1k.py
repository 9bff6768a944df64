# SPDX-License-Identifier: Apache-2.0
"""MambaVision-L2, ImageNet-1K, 310 epochs; published: 85.3 top-1."""

_base_ = './_mambavision_32xb128-310e.py'

model = dict(model_name='mambavision_large2', drop_path_rate=0.3)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
