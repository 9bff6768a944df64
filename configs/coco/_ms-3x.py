# SPDX-License-Identifier: Apache-2.0
"""Data and schedule of the long COCO configs: 36 epochs at several scales."""

_base_ = './_1x.py'

# Half of the images are resized, the other half resized, cropped and resized, as DETR does.
resize = dict(type='RandomChoiceResize', scales=[(s, 1333) for s in range(480, 801, 32)], keep_ratio=True)
resize_first = dict(type='RandomChoiceResize', scales=[(s, 1333) for s in (400, 500, 600)], keep_ratio=True)
crop = dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='RandomChoice', transforms=[[resize], [resize_first, crop, resize]]),
            dict(type='PackDetInputs'),
        ],
    ),
)

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', gamma=0.1, milestones=[27, 33], by_epoch=True, begin=0, end=36),
]
