# SPDX-License-Identifier: Apache-2.0
"""Vim-Ti from its published weights, with patches at a stride of 8, ImageNet-1K, 30 epochs; published: 78.3 top-1.

The published learning rate and weight decay; the batch and the schedule are not known. Vim-S, published 81.6 top-1:
--cfg-options model.model_name=vim_small_patch16_224.
"""

_base_ = '../imagenet/_vim.py'

model = dict(model_name='vim_tiny_patch16_224', patch_stride=8, pretrained=True)
optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=0, end=30, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
