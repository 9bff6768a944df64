# SPDX-License-Identifier: Apache-2.0
"""2DMambaMIL, survival by Cox's partial likelihood over batches of 16 cases, 20 epochs; no result is published."""

_base_ = './survival.py'

model = dict(loss='cox', num_classes=1)
dataset = dict(bins=None)
train_dataloader = dict(batch_size=16, drop_last=True)  # the loss compares the cases of a batch
