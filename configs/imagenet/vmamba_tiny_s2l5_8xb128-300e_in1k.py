# SPDX-License-Identifier: Apache-2.0
"""VMamba-T[s2l5], ImageNet-1K, 300 epochs; published: 82.5 top-1."""

_base_ = './_8xb128-300e.py'

model = dict(model_name='vmamba_tiny_s2l5', drop_path_rate=0.2)
