# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-S, COCO, 36 epochs at several scales, with the recipe of the other networks."""

_base_ = ['./_mambavision_small.py', './_ms-3x.py']
