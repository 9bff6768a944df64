# SPDX-License-Identifier: Apache-2.0
"""UPerNet on MambaVision-T, ADE20K, 160k iterations, with the recipe of the other networks."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='mambavision_tiny'),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
