// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include <immintrin.h>  // with the instruction sets of its own

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define VSSM_VECTOR_BYTES 32
#include "make_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace vssm {
constexpr Kernels<float> kAvx2 = make_kernels<float>("avx2");
}
#endif
