# SPDX-License-Identifier: Apache-2.0
"""UPerNet on VMamba-T from its published weights, for masks of one's own, 20k iterations with 512x512 crops.

    vssm train finetune/upernet_vmamba_tiny_1xb4-20k_folder-512x512 --data-root DIR

DIR has images/{training,validation}/*.jpg, annotations/{training,validation}/*.png, and classes.txt with a name in each
line: the first is that of the value 1 in the masks, and 0 is no class.
"""

_base_ = '../ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512.py'

data = dict(
    type='BaseSegDataset',
    data_root='data/folder',
    metainfo=dict(classes=None),  # the lines of classes.txt
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=True,  # 0 is no class
)
model = dict(decode_head=dict(num_classes=None), auxiliary_head=dict(num_classes=None))  # as many as there are lines

train_dataloader = dict(dataset=data)  # 1 GPU x 4
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader

optim_wrapper = dict(paramwise_cfg=None, optimizer=dict(lr=3e-5))  # ADE20K's 6e-5 by sqrt(4 / 16)
auto_scale_lr = dict(enable=False, base_batch_size=4)
train_cfg = dict(max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=500, end=20000),
]
