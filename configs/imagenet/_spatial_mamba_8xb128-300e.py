# SPDX-License-Identifier: Apache-2.0
"""What the ImageNet-1K configs of Spatial-Mamba share: the rule for weight decay."""

_base_ = './_8xb128-300e.py'

# The biases of its step size are vectors too.
optim_wrapper = dict(paramwise_cfg=dict(no_decay=['*.D', '*.dt_bias']))
