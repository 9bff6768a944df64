# SPDX-License-Identifier: Apache-2.0
"""UPerNet on MambaVision-B, ADE20K, 160k iterations, with the recipe of the other networks."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='mambavision_base', drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
