# SPDX-License-Identifier: Apache-2.0
"""The operators as tensor operations, for exporters that know no operators of ours."""

from collections.abc import Callable

import torch

from . import backend  # noqa: F401, which loads the operators
from .fusion.reference import state_fusion_ref
from .readout.reference import gated_readout_ref
from .scan.decomp import selective_scan_decomp

__all__ = ['DECOMPOSITIONS']

# For `ExportedProgram.run_decompositions`: the operators of the zoo and what stands for them.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable] = {
    torch.ops.vssm.gated_readout.default: gated_readout_ref,
    torch.ops.vssm.selective_scan.default: selective_scan_decomp,
    torch.ops.vssm.state_fusion.default: state_fusion_ref,
}
