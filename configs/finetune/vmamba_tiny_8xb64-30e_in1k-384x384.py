# SPDX-License-Identifier: Apache-2.0
"""VMamba-T from its published weights, ImageNet-1K at 384x384, 30 epochs; no result is published.

Another model: --cfg-options model.model_name=...; one's own weights: model.pretrained=False
model.init_cfg.type=Pretrained model.init_cfg.checkpoint=FILE.
"""

_base_ = '../imagenet/_8xb128-300e.py'

model = dict(
    model_name='vmamba_tiny',
    pretrained=True,
    drop_path_rate=0.2,
    label_smoothing=0.1,
    data_preprocessor=dict(mixup=None),
)

train_dataloader = dict(
    batch_size=64,  # 8 GPUs x 64 = 512
    dataset=dict(transform=dict(input_size=384)),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(transform=dict(input_size=384, crop_pct=1.0)),
)
test_dataloader = val_dataloader

optim_wrapper = dict(paramwise_cfg=None, optimizer=dict(lr=5e-5, weight_decay=1e-8, layer_decay=0.8))
auto_scale_lr = dict(base_batch_size=512)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=0, end=30, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
