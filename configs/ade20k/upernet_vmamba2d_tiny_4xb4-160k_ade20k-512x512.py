# SPDX-License-Identifier: Apache-2.0
"""UPerNet on 2DVMamba-T, ADE20K, 160k iterations; published: 48.6 / 49.3 mIoU at one scale / at several."""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(
        model_name='vmamba2d_tiny',
        pretrained=False,  # none are published: the file is that of one's own training
        init_cfg=dict(
            type='Pretrained', checkpoint='work_dirs/imagenet/vmamba2d_tiny_8xb128-300e_in1k/checkpoint.safetensors'
        ),
    ),
)
