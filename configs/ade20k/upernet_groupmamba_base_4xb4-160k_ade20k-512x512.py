# SPDX-License-Identifier: Apache-2.0
"""UPerNet on GroupMamba-B, ADE20K, 160k iterations; the stochastic depth is a choice by size."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(model_name='groupmamba_base', drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 424, 512]),
    auxiliary_head=dict(in_channels=424),
)
