// SPDX-License-Identifier: Apache-2.0
// The gated readout on the CPU: what the op (gated_readout.cpp) and the kernels (readout_kernel.h) share. No torch
// here.
#pragma once

#include "common.h"

namespace vssm {

template <class T>
struct ReadoutArgs {
  int64_t rows, channels;
  Type type;                    // of h, x, z and C, of the gradients of these, and of y and its gradient
  const char *h, *x, *z;        // (rows, channels)
  const char* C;                // (rows)
  const T *D, *weight, *bias;   // (channels)
  T eps;
};

// Gradients, null where they are not wanted. The parameters' come as one part a task; tasks depend on the shape alone,
// never on the number of threads, and parts are added up in a fixed order: the result is the same for any number of
// threads.
template <class T>
struct ReadoutGrads {
  const char* y;           // (rows, channels)
  char *h, *x, *z;         // (rows, channels)
  char* C;                 // (rows)
  T *D, *weight, *bias;    // (tasks, channels)
  int64_t tasks;
};

}  // namespace vssm
