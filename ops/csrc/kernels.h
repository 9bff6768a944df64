// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, and the instruction sets that there are. No torch here.
#pragma once

#include "fusion.h"
#include "readout.h"
#include "scan.h"

namespace vssm {

template <class T>
struct Kernels {
  const char* name;
  // From a half type: `length` rows of `valid` elements, `step` bytes from one to the next, each `lanes` long in T.
  void (*widen)(T* to, int64_t lanes, const char* from, Type type, int64_t step, int64_t length, int64_t valid);
  // The selective scan: `forward` does the tasks [begin, end) of batch * blocks, `backward` those of image groups *
  // channel groups, each with scratch of its own.
  int64_t (*scan_lanes)(int64_t images, int64_t channels);
  int64_t (*scan_forward_scratch)(const ScanArgs<T>&);
  void (*scan_forward)(const ScanArgs<T>&, char* y, T* scratch, int64_t begin, int64_t end);
  int64_t (*scan_backward_scratch)(const ScanArgs<T>&);
  void (*scan_backward)(const ScanArgs<T>&, const ScanGrads<T>&, T* scratch, int64_t begin, int64_t end);
  // The state fusion: `forward` does the tasks [begin, end) of batch * blocks, `backward` those of image groups *
  // blocks.
  int64_t fusion_lanes;
  int64_t (*fusion_forward_scratch)(const FusionArgs<T>&);
  void (*fusion_forward)(const FusionArgs<T>&, char* y, T* scratch, int64_t begin, int64_t end);
  int64_t (*fusion_backward_scratch)(const FusionArgs<T>&);
  void (*fusion_backward)(const FusionArgs<T>&, const FusionGrads<T>&, T* scratch, int64_t begin, int64_t end);
  // The gated readout: `forward` does the rows [begin, end), `backward` the tasks, which are equal parts of the rows.
  int64_t (*readout_scratch)(const ReadoutArgs<T>&);
  void (*readout_forward)(const ReadoutArgs<T>&, char* y, T* scratch, int64_t begin, int64_t end);
  void (*readout_backward)(const ReadoutArgs<T>&, const ReadoutGrads<T>&, T* scratch, int64_t begin, int64_t end);
};

extern const Kernels<float> kPortable;
extern const Kernels<double> kPortableDouble;
#if defined(__x86_64__)
extern const Kernels<float> kAvx2;
extern const Kernels<float> kAvx512;
#endif

}  // namespace vssm
