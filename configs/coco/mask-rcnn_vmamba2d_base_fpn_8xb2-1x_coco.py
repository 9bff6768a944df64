# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-B, COCO, 12 epochs."""

_base_ = ['./_vmamba2d_base.py', './_1x.py']
