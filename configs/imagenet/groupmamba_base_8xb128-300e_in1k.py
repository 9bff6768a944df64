# SPDX-License-Identifier: Apache-2.0
"""GroupMamba-B, ImageNet-1K, 300 epochs; published: 84.5 top-1, with distillation.

The published network learned from a teacher besides, and its stochastic depth is not known here: the recipe is
VMamba's, the rate a choice by size, and the mean of the two classifiers is trained on the labels.
"""

_base_ = './_8xb128-300e.py'

model = dict(model_name='groupmamba_base', drop_path_rate=0.5)
