# SPDX-License-Identifier: Apache-2.0
"""VMamba-T from its published weights, on any images in folders, DIR/train/CLASS/... and DIR/val/CLASS/..., 50 epochs.

    vssm train finetune/vmamba_tiny_1xb64-50e_folder --data-root DIR

Another model: model.model_name=...; one's own weights: model.pretrained=False model.init_cfg.type=Pretrained
model.init_cfg.checkpoint=FILE. A head for other classes is left out.
"""

_base_ = '../imagenet/_8xb128-300e.py'

model = dict(
    model_name='vmamba_tiny',
    num_classes=None,  # as many as there are folders in train
    pretrained=True,
    drop_path_rate=0.1,
    label_smoothing=0.1,
    data_preprocessor=dict(mixup=None),
)

train_dataloader = dict(
    batch_size=64,  # 1 GPU x 64
    drop_last=False,
    dataset=dict(data_root='data/folder', upright=True),  # photographs turned as their EXIF orientation says
)
val_dataloader = dict(dataset=dict(data_root='data/folder', class_split='train', upright=True))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(paramwise_cfg=None, optimizer=dict(lr=2e-4, layer_decay=0.75))
auto_scale_lr = dict(base_batch_size=64)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=5, end=50, T_max=45, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=50)
default_hooks = dict(checkpoint=dict(interval=5))
custom_hooks = [dict(type='SafetensorsHook')]  # without an average, which would lag behind over so few iterations
