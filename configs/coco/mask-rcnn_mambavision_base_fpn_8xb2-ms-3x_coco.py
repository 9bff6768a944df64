# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-B, COCO, 36 epochs at several scales, with the recipe of the other networks."""

_base_ = ['./_mambavision_base.py', './_ms-3x.py']
