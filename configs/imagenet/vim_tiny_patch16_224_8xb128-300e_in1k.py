# SPDX-License-Identifier: Apache-2.0
"""Vim-Ti, ImageNet-1K, 300 epochs; published: 76.1 top-1."""

_base_ = './_vim.py'

model = dict(model_name='vim_tiny_patch16_224')
