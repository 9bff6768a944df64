# SPDX-License-Identifier: Apache-2.0
"""The gated readout as an operator of PyTorch, `vssm::gated_readout`."""

from .._register import register

run = register('gated_readout', maps=(0, 1, 2, 4))  # h, x, C and z
