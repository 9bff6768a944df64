# SPDX-License-Identifier: Apache-2.0
"""2DMambaMIL, classification of slides by CLAM's protocol: 200 epochs at most, ended by the validation loss.

The rate is constant, the weights are those of the lowest loss on the validation data, and 20 epochs without a lower one
end the training, but not before 50.

    vssm wsi-repeat wsi/classification_clam --folds 10 --data-root DIR --cfg-options dataset.split_file=splits_%d.csv

Its option for unequal classes: train_dataloader.sampler.type=BalancedSampler.
"""

_base_ = './classification.py'

optim_wrapper = dict(optimizer=dict(type='adam'))
param_scheduler = None
train_cfg = dict(max_epochs=200)
default_hooks = dict(
    checkpoint=dict(save_param_scheduler=False),  # there is none
    early_stop=dict(patience=20, begin=50),
)
custom_hooks = [
    dict(type='SafetensorsHook'),
    dict(type='BestHook', metric='wsi/loss'),
    dict(type='PredictionsHook'),
]
