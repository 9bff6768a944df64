// SPDX-License-Identifier: Apache-2.0
// The gated readout for one instruction set, see simd.h.
//
// A row is one position with all its channels. It stays in the first-level cache while it is read out, normalised and
// gated, and the backward does the first of that again rather than keep it.
#pragma once

#include "functions.h"
#include "readout.h"

namespace vssm {
namespace {

// Up to a vector of a row: what lies beyond `valid` channels is zero.
template <class T>
VSSM_INLINE Vec<T> load(const T* p, int64_t valid) {
  if (valid >= kWidth<T>) return load(p);
  Vec<T> v = {};
  for (int64_t l = 0; l < valid; ++l) v[l] = p[l];
  return v;
}

template <class T>
VSSM_INLINE void store(T* p, Vec<T> v, int64_t valid) {
  if (valid >= kWidth<T>) return store(p, v);
  for (int64_t l = 0; l < valid; ++l) p[l] = v[l];
}

template <class T>
VSSM_INLINE T sum_lanes(Vec<T> v) {
  T sum = 0;
  for (int l = 0; l < kWidth<T>; ++l) sum += v[l];
  return sum;
}

template <int M>
struct Vectors {
  static constexpr int count = M;
};

// f(Vectors<M>, first channel, valid channels) over the channels of a row: groups of vectors, then single ones.
template <class T, class F>
VSSM_INLINE void each_group(int64_t channels, const F& f) {
  constexpr int64_t W = kWidth<T>;
  int64_t e = 0;
  for (; e + kGroup * W <= channels; e += kGroup * W) f(Vectors<kGroup>(), e, kGroup * W);
  for (; e + W <= channels; e += W) f(Vectors<1>(), e, W);
  if (e < channels) f(Vectors<1>(), e, channels - e);
}

template <class T>
int64_t readout_scratch(const ReadoutArgs<T>& s) {
  return 2 * ((s.channels + kWidth<T> - 1) / kWidth<T> * kWidth<T>);
}

// n <- (u - mean(u)) / std(u) with u = C h + D x; returns 1 / std(u).
template <class T>
VSSM_INLINE T normalise(const ReadoutArgs<T>& s, int64_t row, T* n) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>;
  const T *h = s.h + row * s.channels, *x = s.x + row * s.channels, C = s.C[row];
  V sums[kGroup] = {};
  each_group<T>(s.channels, [&](auto vectors, int64_t e, int64_t valid) {
    VSSM_UNROLL
    for (int m = 0; m < vectors.count; ++m) {
      const int64_t i = e + m * W;
      const V u = C * load(h + i, valid) + load(s.D + i, valid) * load(x + i, valid);
      store(n + i, u);
      sums[m] += u;
    }
  });
  const T mean = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) / s.channels;
  VSSM_UNROLL
  for (int m = 0; m < kGroup; ++m) sums[m] = V{};
  each_group<T>(s.channels, [&](auto vectors, int64_t e, int64_t valid) {
    VSSM_UNROLL
    for (int m = 0; m < vectors.count; ++m) {
      T* at = n + e + m * W;
      V u = load(at) - mean;
      for (int64_t l = valid; l < W; ++l) u[l] = 0;
      store(at, u);
      sums[m] += u * u;
    }
  });
  const T variance = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) / s.channels;
  const T rate = T(1) / T(__builtin_sqrt(variance + s.eps));
  for (int64_t e = 0; e < s.channels; e += W) store(n + e, load(n + e) * rate);
  return rate;
}

template <class T>
void readout_forward(const ReadoutArgs<T>& s, T* y, T* scratch, int64_t begin, int64_t end) {
  constexpr int W = kWidth<T>;
  for (int64_t row = begin; row < end; ++row) {
    normalise(s, row, scratch);
    const T* z = s.z + row * s.channels;
    T* out = y + row * s.channels;
    each_group<T>(s.channels, [&](auto vectors, int64_t e, int64_t valid) {
      Vec<T> gate[vectors.count];
      VSSM_UNROLL
      for (int m = 0; m < vectors.count; ++m) gate[m] = load(z + e + m * W, valid);
      sigmoid_<T>(gate);
      VSSM_UNROLL
      for (int m = 0; m < vectors.count; ++m) {
        const int64_t i = e + m * W;
        const Vec<T> normed = load(scratch + i) * load(s.weight + i, valid) + load(s.bias + i, valid);
        store(out + i, normed * gate[m] * load(z + i, valid), valid);
      }
    });
  }
}

// The part of a task, (channels), of a parameter's gradient: zeros to begin with; null where it is not wanted.
template <class T>
VSSM_INLINE T* cleared_part(T* gradient, int64_t task, int64_t channels) {
  if (!gradient) return nullptr;
  T* const part = gradient + task * channels;
  std::memset(part, 0, channels * sizeof(T));
  return part;
}

// p[i ...] = v, or += v, up to `valid` channels; nothing where p is null.
template <class T>
VSSM_INLINE void put(T* p, int64_t i, Vec<T> v, int64_t valid) {
  if (p) store(p + i, v, valid);
}
template <class T>
VSSM_INLINE void accumulate(T* p, int64_t i, Vec<T> v, int64_t valid) {
  if (p) store(p + i, load(p + i, valid) + v, valid);
}

template <class T>
void readout_backward(const ReadoutArgs<T>& s, const ReadoutGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>;
  const int64_t E = s.channels;
  const bool before_norm = grad.h || grad.x || grad.C || grad.D;  // whether anything is wanted that enters the norm
  T *n = scratch, *dn = scratch + readout_scratch(s) / 2;
  for (int64_t task = begin; task < end; ++task) {
    T* const dD = cleared_part(grad.D, task, E);
    T* const dweight = cleared_part(grad.weight, task, E);
    T* const dbias = cleared_part(grad.bias, task, E);
    for (int64_t row = task * s.rows / grad.tasks; row < (task + 1) * s.rows / grad.tasks; ++row) {
      const int64_t first = row * E;
      const T rate = normalise(s, row, n);
      V sum_dn[kGroup] = {}, sum_dn_n[kGroup] = {};
      each_group<T>(E, [&](auto vectors, int64_t e, int64_t valid) {
        V gate[vectors.count];  // sigmoid(z)
        VSSM_UNROLL
        for (int m = 0; m < vectors.count; ++m) gate[m] = load(s.z + first + e + m * W, valid);
        sigmoid_<T>(gate);
        VSSM_UNROLL
        for (int m = 0; m < vectors.count; ++m) {
          const int64_t i = e + m * W;
          const V dy = load(grad.y + first + i, valid), weight = load(s.weight + i, valid), normed = load(n + i);
          const V silu = load(s.z + first + i, valid) * gate[m];
          const V dgate = dy * (normed * weight + load(s.bias + i, valid));
          put<T>(grad.z, first + i, dgate * (gate[m] + silu * (T(1) - gate[m])), valid);
          const V dnormed = dy * silu;
          accumulate<T>(dweight, i, dnormed * normed, valid);
          accumulate<T>(dbias, i, dnormed, valid);
          const V d = dnormed * weight;
          store(dn + i, d);
          sum_dn[m] += d;
          sum_dn_n[m] += d * normed;
        }
      });
      if (!before_norm) continue;
      const T mean = sum_lanes<T>((sum_dn[0] + sum_dn[1]) + (sum_dn[2] + sum_dn[3])) / E;
      const T slope = sum_lanes<T>((sum_dn_n[0] + sum_dn_n[1]) + (sum_dn_n[2] + sum_dn_n[3])) / E;
      const T C = s.C[row];
      V sum_C[kGroup] = {};
      each_group<T>(E, [&](auto vectors, int64_t e, int64_t valid) {
        VSSM_UNROLL
        for (int m = 0; m < vectors.count; ++m) {
          const int64_t i = e + m * W;
          V du = (load(dn + i) - mean - load(n + i) * slope) * rate;
          for (int64_t l = valid; l < W; ++l) du[l] = 0;
          put<T>(grad.h, first + i, du * C, valid);
          put<T>(grad.x, first + i, du * load(s.D + i, valid), valid);
          accumulate<T>(dD, i, du * load(s.x + first + i, valid), valid);
          sum_C[m] += du * load(s.h + first + i, valid);
        }
      });
      if (grad.C) grad.C[row] = sum_lanes<T>((sum_C[0] + sum_C[1]) + (sum_C[2] + sum_C[3]));
    }
  }
}

}  // namespace
}  // namespace vssm
