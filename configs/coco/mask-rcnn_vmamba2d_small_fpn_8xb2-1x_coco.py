# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-S, COCO, 12 epochs."""

_base_ = './_mask-rcnn_1x.py'

model = dict(
    backbone=dict(
        model_name='vmamba2d_small',
        pretrained=False,  # none are published: the file is that of one's own training
        init_cfg=dict(
            type='Pretrained', checkpoint='work_dirs/imagenet/vmamba2d_small_8xb128-300e_in1k/checkpoint.safetensors'
        ),
    ),
)
