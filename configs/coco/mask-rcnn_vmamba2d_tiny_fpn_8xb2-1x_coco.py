# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-T, COCO, 12 epochs."""

_base_ = ['./_vmamba2d_tiny.py', './_1x.py']
