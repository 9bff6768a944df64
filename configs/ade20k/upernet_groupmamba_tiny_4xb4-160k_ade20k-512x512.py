# SPDX-License-Identifier: Apache-2.0
"""UPerNet on GroupMamba-T, ADE20K, 160k iterations; the stochastic depth is a choice by size."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='groupmamba_tiny'),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
    auxiliary_head=dict(in_channels=348),
)
