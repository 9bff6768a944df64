# SPDX-License-Identifier: Apache-2.0
"""What the ADE20K configs share: UPerNet, 160k iterations with 512x512 crops."""

_base_ = [
    'mmseg::_base_/models/upernet_swin.py',  # its SyncBN becomes plain BN where there is only one process
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/schedules/schedule_160k.py',
    'mmseg::_base_/default_runtime.py',  # it has the tta_model of `--tta`, for several scales and both flips
]
custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)
runner_type = 'TimmRunner'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='TimmFeatures', reductions=(4, 8, 16, 32), drop_path_rate=0.2, pretrained=True),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)

train_dataloader = dict(batch_size=4)  # 4 GPUs x 4 = 16
default_hooks = dict(checkpoint=dict(interval=4000, max_keep_ckpts=3))
auto_scale_lr = dict(enable=False, base_batch_size=16)
optim_wrapper = dict(
    _delete_=True,
    constructor='TimmOptimWrapperConstructor',
    # As the authors: what has "norm" in its published name does not decay; VMamba's norms of stem and downsampling have
    # none. With None, timm's rule, no vector, bias, decay rate or skip decays.
    paramwise_cfg=dict(no_decay=['*.blocks.*norm*', '*.outnorm*'], vectors_decay=True),
    optimizer=dict(type='adamw', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
randomness = dict(seed=0)
