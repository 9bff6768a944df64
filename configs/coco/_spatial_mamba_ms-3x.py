# SPDX-License-Identifier: Apache-2.0
"""Data and schedule of Spatial-Mamba's long COCO configs: 36 epochs at several scales."""

_base_ = './_ms-3x.py'

# The norms of its blocks are those whose published names lack "norm".
optim_wrapper = dict(paramwise_cfg=dict(no_decay=['*.stem.norm*', '*.downsample.norm*', '*.mixer.norm*', '*.outnorm*']))
