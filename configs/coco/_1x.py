# SPDX-License-Identifier: Apache-2.0
"""Data and schedule of the COCO configs: 12 epochs."""

_base_ = [
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
]

# 8 GPUs x 2 = 16, as in the base, whose auto_scale_lr has this size
optim_wrapper = dict(
    _delete_=True,
    constructor='TimmOptimWrapperConstructor',
    # As the authors: what has "norm" in its published name does not decay; VMamba's norms of stem and downsampling have
    # none. With None, timm's rule, no vector, bias, decay rate or skip decays.
    paramwise_cfg=dict(no_decay=['*.blocks.*norm*', '*.outnorm*'], vectors_decay=True),
    optimizer=dict(type='adamw', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', gamma=0.1, milestones=[8, 11], by_epoch=True, begin=0, end=12),
]
