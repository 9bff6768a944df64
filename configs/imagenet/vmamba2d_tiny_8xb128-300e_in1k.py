# SPDX-License-Identifier: Apache-2.0
"""2DVMamba-T, ImageNet-1K, 300 epochs; published: 82.8 top-1."""

_base_ = './_8xb128-300e.py'

model = dict(model_name='vmamba2d_tiny', drop_path_rate=0.2)
