// SPDX-License-Identifier: Apache-2.0
// What every kernel of the CPU shares with the op that calls it. No torch here.
#pragma once

#include <cstdint>

// Always inlined: a function that the linker could share between files compiled for different instruction sets must not
// be.
#define VSSM_INLINE inline __attribute__((always_inline))

namespace vssm {

// Half types, as they lie in memory.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// How a tensor lies in memory: in the type T that kernels compute in, or in a half type. That is widened when it is
// read, and what sums up is rounded to it once, at the end.
enum class Type { kWhole, kBfloat16, kFloat16 };

template <class T>
VSSM_INLINE int64_t size_of(Type type) {
  return type == Type::kWhole ? sizeof(T) : sizeof(Bfloat16);
}

// A tensor over (batch, H, W[, K], last), the last axis contiguous: strides in elements.
template <class T>
struct Map {
  T* data;
  int64_t batch, row, column, order;
};

// A tensor as it lies: strides in bytes.
struct RawMap : Map<const char> {
  Type type;
};

}  // namespace vssm
