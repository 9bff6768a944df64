// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include "scan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define VSSM_VECTOR_BYTES 32
#include "scan_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace vssm {
constexpr ScanKernels<float> kScanAvx2 = make_kernels<float>("avx2");
}
#endif
