# SPDX-License-Identifier: Apache-2.0
"""Small kernels, imported where kernels are compiled: one that can be launched with faults, a product of matrices."""

import triton
import triton.language as tl


@triton.jit
def reverse(x_ptr, y_ptr, z_ptr, size, BLOCK: tl.constexpr, MASKED: tl.constexpr, BARRIER: tl.constexpr):
    """z = x backwards, by way of y, where other warps find what a warp wrote. Grid: one program."""
    i = tl.arange(0, BLOCK)
    mask = (i < size) | (not MASKED)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=mask), mask=mask)
    if BARRIER:
        tl.debug_barrier()
    tl.store(z_ptr + i, tl.load(y_ptr + size - 1 - i, mask=mask), mask=mask)


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """c = a b, of whole matrices. Grid: one program."""
    row, column, inner = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, INNER)
    a = tl.load(a_ptr + row * INNER + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * COLUMNS + column)
    tl.store(c_ptr + row * COLUMNS + column, tl.dot(a, b))
