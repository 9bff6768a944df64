# SPDX-License-Identifier: Apache-2.0
"""What Vim's configs share: DeiT's recipe, but for its repeated augmentation, which is left out.

No clipping of gradients, five epochs of warm-up, and all in float32. Known of Vim itself are the learning rates, the
weight decay, the stochastic depth, and that weights are averaged; the rest is DeiT's default.
"""

_base_ = './_8xb128-300e.py'

optim_wrapper = dict(
    type='OptimWrapper',
    paramwise_cfg=None,  # timm's rule: decay rates, skips, positions, class token, norms and biases do not decay
    optimizer=dict(weight_decay=0.1),
    clip_grad=None,
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=5, end=300, T_max=295, convert_to_iter_based=True),
]
custom_hooks = [
    dict(type='EMAHook', ema_type='StateAverage', momentum=4e-5),  # 1 - 0.99996
    dict(type='SafetensorsHook'),
]
