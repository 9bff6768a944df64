# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels of all operators have in common. Imported with the first of them."""

import torch
import triton
import triton.language as tl

# How every kernel is launched: a product and a sum become one instruction, whatever a Triton does by itself.
LAUNCH = dict(enable_fp_fusion=True)


def at_most(registers: int) -> dict[str, int]:
    """The launch option that a thread has so many registers at most, for NVIDIA: other compilers do not know it."""
    return {} if torch.version.hip else dict(maxnreg=registers)


_POINTERS_ARE_CHOSEN = tl.constexpr(torch.version.hip is None)


@triton.jit
def _choose(is_first, first_ptr, second_ptr):
    """Pointers to one of two tensors of one type.

    Triton for AMD cannot choose pointers, but integers. Of those it knows no alignment, so that a lane would load the
    values of its channels one by one.
    """
    if _POINTERS_ARE_CHOSEN:
        return tl.where(is_first, first_ptr, second_ptr)
    else:
        return tl.where(is_first, first_ptr.to(tl.int64), second_ptr.to(tl.int64)).to(first_ptr.dtype)
