# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on VMamba-B, COCO, 36 epochs at several scales."""

_base_ = ['./_vmamba_base.py', './_ms-3x.py']
