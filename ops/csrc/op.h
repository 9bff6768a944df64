// SPDX-License-Identifier: Apache-2.0
// What the ops share on PyTorch's side: checks, types, the choice of kernels, threads. Everything goes through
// PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace vssm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Wanted = std::vector<bool>;  // a flag for each of the gradients that a backward operator returns

// PyTorch turns it into a RuntimeError; unlike STD_TORCH_CHECK it does not begin with the path of this file.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The best kernels that the CPU has, or those that VSSM_CPU_CAPABILITY names.
const Kernels<float>& select_kernels();

template <class T>
const Kernels<T>& kernels_for() {
  if constexpr (std::is_same_v<T, double>)
    return kPortableDouble;
  else
    return select_kernels();
}

template <class T>
constexpr ScalarType kType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
Tensor empty(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, shape, kType<T>);
}

// A gradient, which a kernel writes to `data`; where it is not wanted it is empty and `data` null.
template <class T>
Tensor gradient(bool wanted, const Tensor& like, const Shape& shape, T*& data) {
  Tensor t = empty<T>(like, wanted ? shape : Shape{0});
  data = wanted ? t.mutable_data_ptr<T>() : nullptr;
  return t;
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// Half types are widened as a whole: reading them once costs less than widening them in every order.
template <class T>
Tensor last_contiguous(const Tensor& t) {
  const Tensor wide = cast(t, kType<T>);
  const int64_t last = wide.dim() - 1;
  return wide.size(last) == 1 || wide.stride(last) == 1 ? wide : torch::stable::contiguous(wide);
}

template <class T>
Tensor contiguous(const Tensor& t) {
  return torch::stable::contiguous(cast(t, kType<T>));
}

// The strides of a tensor over (batch, H, W[, K], last).
template <class T>
Map<const T> map(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2), t.dim() == 5 ? t.stride(3) : 0};
}

inline bool has_shape(const Tensor& t, const Shape& shape) {
  const auto sizes = t.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

// The number of tasks of `size` elements that is worth a thread: small maps stay on one.
inline int64_t grain(int64_t size) { return std::max<int64_t>(1, (1 << 14) / size); }

// Run tasks of `size` elements in parallel, each thread with a scratch of its own.
template <class T, class F>
void run(const Tensor& like, int64_t tasks, int64_t size, int64_t scratch_size, const F& kernel) {
  const int64_t threads = torch::stable::get_num_threads();
  scratch_size = (scratch_size + 63) / 64 * 64;
  const Tensor scratch = empty<T>(like, {threads * scratch_size + 64});
  T* base = scratch.mutable_data_ptr<T>();
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64 / sizeof(T);
  torch::stable::parallel_for(0, tasks, grain(size), [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    kernel(base + thread * scratch_size, begin, end);
  });
}

// The sum of `parts` equal parts of t, in order; t itself where there is one, or where it is empty.
template <class T>
Tensor sum_parts(const Tensor& t, int64_t parts, const Shape& shape) {
  if (t.numel() == 0) return t;
  if (parts == 1) return torch::stable::reshape(t, shape);
  Tensor out = empty<T>(t, shape);
  const int64_t size = out.numel();
  const T* from = t.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, size, grain(1), [&](int64_t begin, int64_t end) {
    std::copy(from + begin, from + end, to + begin);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) to[i] += from[part * size + i];
  });
  return out;
}

}  // namespace vssm
