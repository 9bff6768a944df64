# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-S, COCO, 36 epochs at several scales; published: 49.9 / 44.2 box / mask AP."""

_base_ = ['./_vmamba_small.py', './_ms-3x.py']
