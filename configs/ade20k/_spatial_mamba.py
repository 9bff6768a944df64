# SPDX-License-Identifier: Apache-2.0
"""What the ADE20K configs of Spatial-Mamba share: the rule for weight decay."""

_base_ = './_upernet.py'

# The norms of its blocks are those whose published names lack "norm".
optim_wrapper = dict(paramwise_cfg=dict(no_decay=['*.stem.norm*', '*.downsample.norm*', '*.mixer.norm*', '*.outnorm*']))
