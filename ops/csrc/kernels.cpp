// SPDX-License-Identifier: Apache-2.0
// Which kernels run: the choice of the instruction set, and its name as an op.
#include <cstdlib>

#include "op.h"

namespace vssm {
namespace {

bool supported(const Kernels<float>& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (&kernels == &kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

}  // namespace

const Kernels<float>& select_kernels() {
  static const Kernels<float>* const all[] = {
#if defined(__x86_64__)
      &kAvx512, &kAvx2,
#endif
      &kPortable};
  const char* wanted = std::getenv("VSSM_CPU_CAPABILITY");
  std::string names;
  for (const auto* kernels : all) {
    if (!supported(*kernels)) continue;
    if (!wanted || !*wanted || kernels->name == std::string(wanted)) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error("VSSM_CPU_CAPABILITY must be one of " + names + " on this CPU, got " + wanted + ".");
}

namespace {
std::string cpu_capability() { return select_kernels().name; }
}  // namespace

STABLE_TORCH_LIBRARY(vssm, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(vssm, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&cpu_capability)); }

}  // namespace vssm
