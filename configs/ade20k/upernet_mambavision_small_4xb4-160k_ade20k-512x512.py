# SPDX-License-Identifier: Apache-2.0
"""UPerNet on MambaVision-S, ADE20K, 160k iterations, with the recipe of the other networks."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='mambavision_small'),
)
