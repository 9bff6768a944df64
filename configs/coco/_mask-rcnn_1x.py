# SPDX-License-Identifier: Apache-2.0
"""What the COCO configs share: Mask R-CNN with an FPN, 12 epochs."""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)
runner_type = 'TimmRunner'

model = dict(
    backbone=dict(_delete_=True, type='TimmFeatures', drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(  # whose boxes keep their digits when the rest computes in bfloat16
        bbox_roi_extractor=dict(type='Float32RoIExtractor'),
        mask_roi_extractor=dict(type='Float32RoIExtractor'),
    ),
)

# 8 GPUs x 2 = 16, as in the base, whose auto_scale_lr has this size
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
optim_wrapper = dict(
    _delete_=True,
    constructor='TimmOptimWrapperConstructor',  # norms, biases, decay rates and skips do not decay
    optimizer=dict(type='adamw', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', gamma=0.1, milestones=[8, 11], by_epoch=True, begin=0, end=12),
]
randomness = dict(seed=0)
