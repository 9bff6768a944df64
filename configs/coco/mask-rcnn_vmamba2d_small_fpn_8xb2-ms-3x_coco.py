# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-S, COCO, 36 epochs at several scales."""

_base_ = ['./_vmamba2d_small.py', './_ms-3x.py']
