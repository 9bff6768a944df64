// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction set, see simd.h.
#pragma once

#include "fusion_kernel.h"
#include "kernels.h"
#include "readout_kernel.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace vssm {
namespace {

template <class T>
constexpr Kernels<T> make_kernels(const char* name) {
  return {name,
          widen<T>,
          scan_lanes<T>,
          scan_forward_scratch<T>,
          scan_forward<T>,
          scan_backward_scratch<T>,
          scan_backward<T>,
          kWidth<T>,
          fusion_forward_scratch<T>,
          fusion_forward<T>,
          fusion_backward_scratch<T>,
          fusion_backward<T>,
          readout_scratch<T>,
          readout_forward<T>,
          readout_backward<T>};
}

}  // namespace
}  // namespace vssm
