# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-B, COCO, 12 epochs, with the recipe of the other networks."""

_base_ = ['./_mambavision_base.py', './_1x.py']
