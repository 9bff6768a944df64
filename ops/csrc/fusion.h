// SPDX-License-Identifier: Apache-2.0
// The state fusion on the CPU: what the op (state_fusion.cpp) and the kernels (fusion_kernel.h) share. No torch here.
#pragma once

#include "common.h"

namespace vssm {

constexpr int kReach = 5;      // the largest dilation: how far a position reaches in each direction
constexpr int kTaps = 25;      // three 3x3 neighbourhoods of dilation 1, 3 and 5 share their centre
constexpr int kRows[] = {-5, -5, -5, -3, -3, -3, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 3, 3, 3, 5, 5, 5};
constexpr int kColumns[] = {-5, 0, 5, -3, 0, 3, -1, 0, 1, -5, -3, -1, 0, 1, 3, 5, -1, 0, 1, -3, 0, 3, -5, 0, 5};

template <class T>
struct FusionArgs {
  int64_t batch, height, width, channels;  // of h
  RawMap h;
  const T* packed;  // the merged weights by channel block, zero beyond the channels: (blocks, kTaps, lanes)
  int64_t lanes;    // channels of a block

  VSSM_INLINE int64_t num_blocks() const { return (channels + lanes - 1) / lanes; }
  VSSM_INLINE const T* weight(int64_t block) const { return packed + block * kTaps * lanes; }
};

// Gradients, null where they are not wanted. The weights' come as one part an image group; groups depend on the shape
// alone, never on the number of threads, and parts are added up in a fixed order: the result is the same for any number
// of threads.
template <class T>
struct FusionGrads {
  RawMap y;
  char* h;    // (batch, H, W, E), in the type of the map h
  T* weight;  // (image groups, blocks, kTaps, lanes)
  int64_t image_groups;
};

}  // namespace vssm
