// SPDX-License-Identifier: Apache-2.0
// The selective scan on the CPU: what the op (selective_scan.cpp) and the kernels (scan_forward.h, scan_backward.h)
// share. No torch here.
#pragma once

#include "common.h"

namespace vssm {

template <class T>
struct ScanArgs {
  int64_t batch, height, width, channels;  // of x
  int64_t num_orders, states, rank;        // K, N, and R, 0 where dt comes in full
  int orders[4];
  int ndim;
  bool softplus;
  RawMap x;
  Map<const T> dt, B, C;
  const T *A, *D, *bias, *weight;  // (K, E, N), (K, E), (K, E), (K, E, R); null where an option is absent
  int64_t lanes;                   // channels of a block

  VSSM_INLINE int64_t positions() const { return height * width; }
  VSSM_INLINE int64_t num_blocks() const { return (channels + lanes - 1) / lanes; }
};

// Gradients, null where they are not wanted. Those of a position's channels are whole; those that sum over channels
// come as one part a channel group, those that sum over positions as one part an image group. Groups depend on the
// shape alone, never on the number of threads, and parts are added up in a fixed order: the result is the same for any
// number of threads.
template <class T>
struct ScanGrads {
  RawMap y;
  char* x;    // (batch, H, W, E), in the type of the map x
  T* dt;      // (batch, H, W, K, E), or (channel groups, batch, H, W, K, R)
  T *B, *C;   // (channel groups, batch, H, W, K, N)
  T* params;  // (image groups, blocks, K, N + 2 + R, lanes): A, bias, D, weight; never null
  bool weight;  // whether the weight's is wanted; if not, params has no room for it
  int64_t image_groups, channel_groups;
  VSSM_INLINE int64_t params_size(const ScanArgs<T>& s) const {
    return (s.states + 2 + (weight ? s.rank : 0)) * s.lanes;
  }
};

}  // namespace vssm
