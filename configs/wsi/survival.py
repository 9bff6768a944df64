# SPDX-License-Identifier: Apache-2.0
"""2DMambaMIL, survival by the discrete-time likelihood in 4 time bins, 20 epochs, the recipe of the paper.

vssm train wsi/survival --data-root DIR --cfg-options dataset.ann_file=survival.csv dataset.folds=5 dataset.fold=0
"""

_base_ = './classification.py'

model = dict(
    type='SlideSurvival',
    num_classes=4,  # time bins
    alpha=0.0,
)
dataset = dict(ann_file='survival.csv', task='survival', bins=4)
val_evaluator = dict(type='ConcordanceIndex')
test_evaluator = val_evaluator
custom_hooks = [
    dict(type='SafetensorsHook'),
    dict(type='BestHook', metric='wsi/c_index'),
    dict(type='PredictionsHook'),
]
