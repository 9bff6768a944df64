# SPDX-License-Identifier: Apache-2.0
"""The test model with the 2-D scan on scikit-learn's handwritten digits."""

custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)
runner_type = 'TimmRunner'
device = 'cpu'  # maps this small give a GPU no work
num_threads = 1  # nor a second thread; and the result does not depend on the number of cores
randomness = dict(seed=0, deterministic=True)

model = dict(type='ImageClassifier', model_name='test_vmamba2d', num_classes=10, in_chans=1)

train_dataloader = dict(
    batch_size=64,  # 18 iterations an epoch; the 46 images that remain are left out
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='Digits',
        split='train',
        affine=dict(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1)),
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='Digits', split='heldout'),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy')
test_evaluator = val_evaluator

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='adamw', lr=4e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [  # a warm-up over 2 epochs, times half a cosine over all epochs
    dict(type='LinearLR', start_factor=0.01, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=30)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1000),  # longer than an epoch, so that its end alone is logged
    checkpoint=dict(type='CheckpointHook', interval=5, max_keep_ckpts=2),  # to resume from
)
custom_hooks = [dict(type='SafetensorsHook')]  # for timm
log_processor = dict(custom_cfg=[dict(data_src='loss', method_name='mean', window_size='epoch')])
