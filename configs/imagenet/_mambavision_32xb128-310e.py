# SPDX-License-Identifier: Apache-2.0
"""What the ImageNet-1K configs of MambaVision share: 310 epochs, batches of 4096, LAMB, MESA.

Stochastic depth, learning rate, epochs, lowest rate, clipping, augmentation and the weight of MESA are the authors'.
That they used LAMB, batches of 4096 and a weight decay of 0.05 could not be checked here; their warm-up, label
smoothing, erasing and average are not known, and those are VMamba's.
"""

_base_ = './_8xb128-300e.py'

# 32 GPUs x 128 = 4096
optim_wrapper = dict(
    paramwise_cfg=dict(no_decay=['*.D', '*.dt_bias']),  # vectors, where they are published
    optimizer=dict(_delete_=True, type='lamb', lr=5e-3, weight_decay=0.05),
)
auto_scale_lr = dict(base_batch_size=4096)
param_scheduler = [  # the last ten epochs stay at the lowest rate
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-3, begin=20, end=300, T_max=280, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=310)
custom_hooks = [
    dict(type='EMAHook', ema_type='StateAverage', momentum=1e-4),
    dict(type='MESAHook', weight=0.5),
    dict(type='SafetensorsHook'),
]
