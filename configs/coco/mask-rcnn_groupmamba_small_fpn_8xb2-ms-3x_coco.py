# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on GroupMamba-S, COCO, 36 epochs at several scales; the stochastic depth is a choice by size."""

_base_ = ['./_groupmamba_small.py', './_ms-3x.py']
