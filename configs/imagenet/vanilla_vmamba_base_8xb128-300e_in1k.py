# SPDX-License-Identifier: Apache-2.0
"""Vanilla VMamba-B, ImageNet-1K, 300 epochs; published: 83.7 top-1."""

_base_ = './_8xb128-300e.py'

model = dict(model_name='vanilla_vmamba_base', drop_path_rate=0.6)
