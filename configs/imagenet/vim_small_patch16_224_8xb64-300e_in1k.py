# SPDX-License-Identifier: Apache-2.0
"""Vim-S, ImageNet-1K, 300 epochs; published: 80.5 top-1."""

_base_ = './_vim.py'

model = dict(model_name='vim_small_patch16_224', drop_path_rate=0.05)
train_dataloader = dict(batch_size=64)  # 8 GPUs x 64 = 512, at the rate that the others have for 1024
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=512)
