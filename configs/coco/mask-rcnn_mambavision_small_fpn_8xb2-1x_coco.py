# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on MambaVision-S, COCO, 12 epochs, with the recipe of the other networks."""

_base_ = ['./_mambavision_small.py', './_1x.py']
