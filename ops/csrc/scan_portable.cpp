// SPDX-License-Identifier: Apache-2.0
// 128-bit vectors: SSE2 on x86-64, NEON on Arm. Also the float64 kernels, whose speed does not matter.
#include "scan.h"

#define VSSM_VECTOR_BYTES 16
#include "scan_kernel.h"

namespace vssm {
constexpr ScanKernels<float> kScanPortable = make_kernels<float>("portable");
constexpr ScanKernels<double> kScanPortableDouble = make_kernels<double>("portable");
}  // namespace vssm
