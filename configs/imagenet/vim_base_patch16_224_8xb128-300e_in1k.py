# SPDX-License-Identifier: Apache-2.0
"""Vim-B, ImageNet-1K, 300 epochs; published: 81.9 top-1."""

_base_ = './_vim.py'

model = dict(model_name='vim_base_patch16_224', drop_path_rate=0.4)
