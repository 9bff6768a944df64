# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-S, COCO, 12 epochs."""

_base_ = ['./_vmamba2d_small.py', './_1x.py']
