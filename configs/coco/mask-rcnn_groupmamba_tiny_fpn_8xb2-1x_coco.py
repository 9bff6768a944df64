# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on GroupMamba-T, COCO, 12 epochs; the stochastic depth is a choice by size."""

_base_ = ['./_groupmamba_tiny.py', './_1x.py']
