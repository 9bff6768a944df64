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

// A row of the maps in T: where it lies, or widened in the scratch. What is written to that is rounded at the end.
template <class T>
struct ReadoutRow {
  const Type type;
  const int64_t channels, row;
  T* room;

  // Room for a row, whole vectors.
  static VSSM_INLINE int64_t size(int64_t channels) { return (channels + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }

  VSSM_INLINE T* take() {
    T* const p = room;
    room += size(channels);
    return p;
  }
  VSSM_INLINE int64_t offset(int64_t elements) const { return row * elements * size_of<T>(type); }

  // The `elements` of this row that a map has, C alone one of them.
  VSSM_INLINE const T* from(const char* map, int64_t elements) {
    const char* const at = map + offset(elements);
    if (type == Type::kWhole) return reinterpret_cast<const T*>(at);
    T* const to = take();
    widen(to, elements, at, type, 0, 1, elements);
    return to;
  }
  // Where to write this row of a map, null where that is; then `round` it.
  VSSM_INLINE T* to(char* map) {
    if (!map || type != Type::kWhole) return map ? take() : nullptr;
    return reinterpret_cast<T*>(map + offset(channels));
  }
  VSSM_INLINE void round(char* map, const T* values, int64_t elements) const {
    if (map && type != Type::kWhole) narrow(map + offset(elements), type, 0, values, 0, 1, elements);
  }
};

template <class T>
int64_t readout_scratch(const ReadoutArgs<T>& s) {
  const int64_t rows = s.type == Type::kWhole ? 2 : 10;  // n and dn; h, x, C, z, dy, dh, dx and dz
  return rows * ReadoutRow<T>::size(s.channels);
}

// n <- u - mean(u) with u = C h + D x; returns 1 / std(u).
template <class T>
VSSM_INLINE T centre(const ReadoutArgs<T>& s, const T* h, const T* x, T C, T* n) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>;
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
  return T(1) / T(__builtin_sqrt(variance + s.eps));
}

template <class T>
void readout_forward(const ReadoutArgs<T>& s, char* y, T* scratch, int64_t begin, int64_t end) {
  constexpr int W = kWidth<T>;
  for (int64_t row = begin; row < end; ++row) {
    ReadoutRow<T> r{s.type, s.channels, row, scratch};
    T* const n = r.take();
    const T *h = r.from(s.h, s.channels), *x = r.from(s.x, s.channels), *z = r.from(s.z, s.channels);
    const T rate = centre(s, h, x, *r.from(s.C, 1), n);
    T* const out = r.to(y);
    each_group<T>(s.channels, [&](auto vectors, int64_t e, int64_t valid) {
      Vec<T> gate[vectors.count];
      VSSM_UNROLL
      for (int m = 0; m < vectors.count; ++m) gate[m] = load(z + e + m * W, valid);
      sigmoid_<T>(gate);
      VSSM_UNROLL
      for (int m = 0; m < vectors.count; ++m) {
        const int64_t i = e + m * W;
        const Vec<T> normed = load(n + i) * rate * load(s.weight + i, valid) + load(s.bias + i, valid);
        store(out + i, normed * gate[m] * load(z + i, valid), valid);
      }
    });
    r.round(y, out, s.channels);
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
  for (int64_t task = begin; task < end; ++task) {
    T* const dD = cleared_part(grad.D, task, E);
    T* const dweight = cleared_part(grad.weight, task, E);
    T* const dbias = cleared_part(grad.bias, task, E);
    for (int64_t row = task * s.rows / grad.tasks; row < (task + 1) * s.rows / grad.tasks; ++row) {
      ReadoutRow<T> r{s.type, E, row, scratch};
      T *const n = r.take(), *const dn = r.take();
      const T *h = r.from(s.h, E), *x = r.from(s.x, E), *z = r.from(s.z, E), *dy_row = r.from(grad.y, E);
      const T C = *r.from(s.C, 1);
      T *const dh = r.to(grad.h), *const dx = r.to(grad.x), *const dz = r.to(grad.z);
      const T rate = centre(s, h, x, C, n);
      for (int64_t e = 0; e < E; e += W) store(n + e, load(n + e) * rate);
      V sum_dn[kGroup] = {}, sum_dn_n[kGroup] = {};
      each_group<T>(E, [&](auto vectors, int64_t e, int64_t valid) {
        V gate[vectors.count];  // sigmoid(z)
        VSSM_UNROLL
        for (int m = 0; m < vectors.count; ++m) gate[m] = load(z + e + m * W, valid);
        sigmoid_<T>(gate);
        VSSM_UNROLL
        for (int m = 0; m < vectors.count; ++m) {
          const int64_t i = e + m * W;
          const V dy = load(dy_row + i, valid), weight = load(s.weight + i, valid), normed = load(n + i);
          const V silu = load(z + i, valid) * gate[m];
          const V dgate = dy * (normed * weight + load(s.bias + i, valid));
          put<T>(dz, i, dgate * (gate[m] + silu * (T(1) - gate[m])), valid);
          const V dnormed = dy * silu;
          accumulate<T>(dweight, i, dnormed * normed, valid);
          accumulate<T>(dbias, i, dnormed, valid);
          const V d = dnormed * weight;
          store(dn + i, d);
          sum_dn[m] += d;
          sum_dn_n[m] += d * normed;
        }
      });
      r.round(grad.z, dz, E);
      if (!before_norm) continue;
      const T mean = sum_lanes<T>((sum_dn[0] + sum_dn[1]) + (sum_dn[2] + sum_dn[3])) / E;
      const T slope = sum_lanes<T>((sum_dn_n[0] + sum_dn_n[1]) + (sum_dn_n[2] + sum_dn_n[3])) / E;
      V sum_C[kGroup] = {};
      each_group<T>(E, [&](auto vectors, int64_t e, int64_t valid) {
        VSSM_UNROLL
        for (int m = 0; m < vectors.count; ++m) {
          const int64_t i = e + m * W;
          V du = (load(dn + i) - mean - load(n + i) * slope) * rate;
          for (int64_t l = valid; l < W; ++l) du[l] = 0;
          put<T>(dh, i, du * C, valid);
          put<T>(dx, i, du * load(s.D + i, valid), valid);
          accumulate<T>(dD, i, du * load(x + i, valid), valid);
          sum_C[m] += du * load(h + i, valid);
        }
      });
      r.round(grad.h, dh, E), r.round(grad.x, dx, E);
      const T dC[kWidth<T>] = {sum_lanes<T>((sum_C[0] + sum_C[1]) + (sum_C[2] + sum_C[3]))};
      r.round(grad.C, dC, 1);
      if (grad.C && s.type == Type::kWhole) reinterpret_cast<T*>(grad.C)[row] = dC[0];
    }
  }
}

}  // namespace
}  // namespace vssm
