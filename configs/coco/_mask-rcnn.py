# SPDX-License-Identifier: Apache-2.0
"""What all COCO configs share but for data and schedule: Mask R-CNN with an FPN."""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)
runner_type = 'TimmRunner'

model = dict(
    backbone=dict(_delete_=True, type='TimmFeatures', reductions=(4, 8, 16, 32), drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(  # with boxes that keep their digits when all else computes in bfloat16
        bbox_roi_extractor=dict(type='Float32RoIExtractor'),
        mask_roi_extractor=dict(type='Float32RoIExtractor'),
    ),
)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
randomness = dict(seed=0)
