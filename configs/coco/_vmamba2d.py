# SPDX-License-Identifier: Apache-2.0
"""What the COCO configs of 2DVMamba share: weights of one's own training, as none are published."""

_base_ = './_mask-rcnn.py'

model = dict(backbone=dict(pretrained=False, init_cfg=dict(type='Pretrained')))
