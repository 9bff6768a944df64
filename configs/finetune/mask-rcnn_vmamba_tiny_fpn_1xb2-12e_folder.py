# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-T from its published weights, for outlines of one's own in COCO's format, 12 epochs.

    vssm train finetune/mask-rcnn_vmamba_tiny_fpn_1xb2-12e_folder --data-root DIR

DIR has train.json and val.json, and the images in train/ and val/. The classes are the categories of train.json.
"""

_base_ = '../coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco.py'

data = dict(data_root='data/folder/', metainfo=dict(classes=None))  # those of the json
model = dict(roi_head=dict(bbox_head=dict(num_classes=None), mask_head=dict(num_classes=None)))  # their number

train_dataloader = dict(dataset=dict(**data, ann_file='train.json', data_prefix=dict(img='train/')))  # 1 GPU x 2
val_dataloader = dict(dataset=dict(**data, ann_file='val.json', data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/folder/val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(paramwise_cfg=None, optimizer=dict(lr=3.5e-5))  # COCO's 1e-4 by sqrt(2 / 16)
auto_scale_lr = dict(base_batch_size=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, begin=0, end=1, convert_to_iter_based=True),
    dict(type='MultiStepLR', gamma=0.1, milestones=[8, 11], begin=0, end=12),
]
