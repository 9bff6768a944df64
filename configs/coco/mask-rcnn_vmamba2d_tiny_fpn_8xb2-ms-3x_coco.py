# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on 2DVMamba-T, COCO, 36 epochs at several scales."""

_base_ = ['./_vmamba2d_tiny.py', './_ms-3x.py']
