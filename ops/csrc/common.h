// SPDX-License-Identifier: Apache-2.0
// What every kernel of the CPU shares with the op that calls it. No torch here.
#pragma once

#include <cstdint>

// Always inlined: a function that the linker could share between files compiled for different instruction sets must not
// be.
#define VSSM_INLINE inline __attribute__((always_inline))

namespace vssm {

// A tensor over (batch, H, W[, K], last), the last axis contiguous: strides in elements.
template <class T>
struct Map {
  T* data;
  int64_t batch, row, column, order;
};

}  // namespace vssm
