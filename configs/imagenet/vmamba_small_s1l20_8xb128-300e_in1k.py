# SPDX-License-Identifier: Apache-2.0
"""VMamba-S[s1l20], ImageNet-1K, 300 epochs; published: 83.3 top-1."""

_base_ = './_8xb128-300e.py'

model = dict(model_name='vmamba_small_s1l20', drop_path_rate=0.3)
