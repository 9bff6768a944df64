# SPDX-License-Identifier: Apache-2.0
"""Faster R-CNN on VMamba-T from its published weights, for boxes of one's own in COCO's format, 12 epochs.

    vssm train finetune/faster-rcnn_vmamba_tiny_fpn_1xb2-12e_folder --data-root DIR

DIR has train.json and val.json, and the images in train/ and val/. The classes are the categories of train.json.
"""

_base_ = './mask-rcnn_vmamba_tiny_fpn_1xb2-12e_folder.py'

model = dict(type='FasterRCNN', roi_head=dict(mask_roi_extractor=None, mask_head=None))

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
