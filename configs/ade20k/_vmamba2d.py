# SPDX-License-Identifier: Apache-2.0
"""What the ADE20K configs of 2DVMamba share: weights of one's own training, as none are published."""

_base_ = './_upernet.py'

model = dict(backbone=dict(pretrained=False, init_cfg=dict(type='Pretrained')))
