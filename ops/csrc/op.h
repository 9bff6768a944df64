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

// A result in the type in which a `readable` tensor lies.
inline Tensor result_like(bool wanted, const Tensor& like, const Shape& shape, char*& data) {
  Tensor t = torch::stable::new_empty(like, wanted ? shape : Shape{0}, like.scalar_type());
  data = wanted ? static_cast<char*>(t.mutable_data_ptr()) : nullptr;
  return t;
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// How a tensor lies to kernels that compute in T.
template <class T>
Type type_of(const Tensor& t) {
  if (std::is_same_v<T, float> && t.scalar_type() == ScalarType::BFloat16) return Type::kBfloat16;
  if (std::is_same_v<T, float> && t.scalar_type() == ScalarType::Half) return Type::kFloat16;
  return Type::kWhole;
}

// The tensor as a kernel takes it: in T, or where that is float in a half type.
template <class T>
Tensor readable(const Tensor& t) {
  return type_of<T>(t) == Type::kWhole ? cast(t, kType<T>) : t;
}

inline Tensor last_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
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

inline const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

// The same of a `readable` tensor.
template <class T>
RawMap raw_map(const Tensor& t) {
  const Type type = type_of<T>(t);
  const int64_t bytes = size_of<T>(type);
  return {{bytes_of(t), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes, 0}, type};
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

// A tensor over (batch, H, W, K, last), its last axis contiguous, in T. For what all channels of a position share:
// widening it once costs less than in every block of channels.
template <class T>
Tensor widened(const Kernels<T>& kernels, const Tensor& t) {
  const Type type = type_of<T>(t);
  const Tensor from = last_contiguous(readable<T>(t));
  if (type == Type::kWhole) return from;
  const int64_t height = t.size(1), width = t.size(2), orders = t.size(3), last = t.size(4), bytes = size_of<T>(type);
  const int64_t row = from.stride(1) * bytes, column = from.stride(2) * bytes, order = from.stride(3) * bytes;
  const bool in_rows = column == orders * order;  // those of a line of the map
  Tensor out = empty<T>(t, {t.size(0), height, width, orders, last});
  T* const to = out.template mutable_data_ptr<T>();
  const int64_t lines = t.size(0) * height, size = width * orders * last;
  torch::stable::parallel_for(0, lines, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const char* const at = bytes_of(from) + line / height * from.stride(0) * bytes + line % height * row;
      T* const to_line = to + line * size;
      if (in_rows && order == last * bytes) kernels.widen(to_line, size, at, type, 0, 1, size);
      else if (in_rows) kernels.widen(to_line, last, at, type, order, width * orders, last);
      else
        for (int64_t j = 0; j < width; ++j)
          kernels.widen(to_line + j * orders * last, last, at + j * column, type, order, orders, last);
    }
  });
  return out;
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
