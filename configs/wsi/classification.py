# SPDX-License-Identifier: Apache-2.0
"""2DMambaMIL, classification of slides, 20 epochs, the recipe of the paper.

    vssm train wsi/classification --data-root DIR --cfg-options dataset.ann_file=labels.csv model.num_classes=3

Another network: model.model_name=NAME, one out of list_mil_models(), such as mambamil, transmil or attention_mil. The
grid of each slide has the step of its patches; for slides of too few patches to tell it: model.patch_size=256.
"""

custom_imports = dict(imports=['vssm.models.mm', 'vssm.models.mm.wsi'], allow_failed_imports=False)
runner_type = 'TimmRunner'

model = dict(
    type='SlideClassifier',
    model_name='mamba2d_mil',
    in_dim=1024,
    num_classes=2,
    drop_rate=0.25,
)

dataset = dict(  # arguments of all three data sets
    type='SlideDataset',
    data_root='data/wsi',
    ann_file='labels.csv',
    task='classification',
)
train_dataloader = dict(
    batch_size=1,  # one slide
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='list_bags'),
    dataset=dict(split='train'),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='list_bags'),
    dataset=dict(split='val'),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='list_bags'),
    dataset=dict(split='test'),
)
val_evaluator = dict(type='SlideAccuracy')
test_evaluator = val_evaluator

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',  # norms, biases, decay rates and skips do not decay
    optimizer=dict(type='adamw', lr=1e-4, weight_decay=1e-5),
)
param_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]  # over all epochs
train_cfg = dict(by_epoch=True, max_epochs=20)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    early_stop=dict(type='EarlyStopHook', metric='wsi/loss', patience=None),  # of the validation; None for no end
)
custom_hooks = [
    dict(type='SafetensorsHook'),  # writes the last epoch
    dict(type='BestHook', metric='wsi/auc'),  # writes the best on the validation data, best.safetensors
    dict(type='PredictionsHook'),
]
randomness = dict(seed=0)  # the published results are over the seeds 0 to 4, see `vssm wsi-repeat`
