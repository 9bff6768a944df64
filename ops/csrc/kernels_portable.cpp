// SPDX-License-Identifier: Apache-2.0
// 128-bit vectors: SSE2 on x86-64, NEON on Arm. Also the float64 kernels, whose speed does not matter.
#define VSSM_VECTOR_BYTES 16
#include "make_kernels.h"

namespace vssm {
constexpr Kernels<float> kPortable = make_kernels<float>("portable");
constexpr Kernels<double> kPortableDouble = make_kernels<double>("portable");
}  // namespace vssm
