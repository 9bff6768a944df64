# SPDX-License-Identifier: Apache-2.0
"""Data and schedule of Spatial-Mamba's COCO configs: 12 epochs."""

_base_ = './_1x.py'

# The norms of its blocks are those whose published names lack "norm".
optim_wrapper = dict(paramwise_cfg=dict(no_decay=['*.stem.norm*', '*.downsample.norm*', '*.mixer.norm*', '*.outnorm*']))
