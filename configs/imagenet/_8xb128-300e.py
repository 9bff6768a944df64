# SPDX-License-Identifier: Apache-2.0
"""What the ImageNet-1K configs share: 300 epochs at 224x224, batches of 1024, the recipe of VMamba."""

custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)
runner_type = 'TimmRunner'

model = dict(
    type='ImageClassifier',
    num_classes=1000,
    data_preprocessor=dict(
        type='ImagePreprocessor',
        random_erasing=dict(probability=0.25, mode='pixel'),
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, label_smoothing=0.1),
    ),
)

train_dataloader = dict(
    batch_size=128,  # 8 GPUs x 128 = 1024
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root='data/imagenet',
        split='train',
        upright=False,  # as published
        transform=dict(input_size=224, is_training=True, auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic'),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root='data/imagenet',
        split='val',
        class_split='val',  # it has all classes, so that a test needs no training images
        upright=False,
        transform=dict(input_size=224, crop_pct=0.875, interpolation='bicubic'),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    # As the authors: beside vectors and biases the skips, one vector there, do not decay, but the decay rates do, and
    # VMamba's biases of the step size. With None, timm's rule, these do not either.
    paramwise_cfg=dict(no_decay=['*.D']),
    optimizer=dict(type='adamw', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=20, end=300, T_max=280, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
)
custom_hooks = [
    dict(
        type='EMAHook', ema_type='StateAverage', momentum=1e-4
    ),  # 1 - 0.9999; the average is evaluated, and written for timm
    dict(type='SafetensorsHook'),
]
randomness = dict(seed=0)
