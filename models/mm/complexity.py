# SPDX-License-Identifier: Apache-2.0
"""The costs of our ops for mmengine's complexity analysis, and so for the packages' get_flops.py."""

from mmengine.analysis import complexity_analysis

from ...ops.counting import ACTIVATIONS, MACS

__all__ = ['count_ops']


def count_ops() -> None:
    """Let mmengine's analyzers count our ops, which they would leave out, for the whole process."""
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(MACS)
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.update(ACTIVATIONS)
