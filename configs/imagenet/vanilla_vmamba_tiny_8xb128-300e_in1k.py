# SPDX-License-Identifier: Apache-2.0
"""Vanilla VMamba-T, ImageNet-1K, 300 epochs; published: 82.2 top-1.

The network with that accuracy was trained with a stochastic depth of 0.1, as the name of its file says.
"""

_base_ = './_8xb128-300e.py'

model = dict(model_name='vanilla_vmamba_tiny', drop_path_rate=0.2)
