# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-T, COCO, 36 epochs at several scales; published: 48.8 / 43.7 box / mask AP."""

_base_ = ['./_vmamba_tiny.py', './_ms-3x.py']
