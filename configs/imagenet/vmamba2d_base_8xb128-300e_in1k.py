# SPDX-License-Identifier: Apache-2.0
"""2DVMamba-B, ImageNet-1K, 300 epochs; no result is published."""

_base_ = './_8xb128-300e.py'

model = dict(model_name='vmamba2d_base', drop_path_rate=0.6)
