# SPDX-License-Identifier: Apache-2.0
"""UPerNet on GroupMamba-S, ADE20K, 160k iterations; the stochastic depth is a choice by size."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='groupmamba_small', drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 348, 512]),
    auxiliary_head=dict(in_channels=348),
)
