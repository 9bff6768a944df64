// SPDX-License-Identifier: Apache-2.0
// The parameters of the selective scan by block of channels, as ScanArgs describes.
#pragma once

#include <utility>

#include "scan_walk.h"

namespace vssm {
namespace {

// The lanes of two vectors in turns, from lane `FROM` of each on.
template <int FROM, class V, int... LANE>
VSSM_INLINE V interleave(V a, V b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, (FROM + LANE / 2 + LANE % 2 * int(sizeof...(LANE)))...);
}

// A square of numbers: lane j of vector i changes places with lane i of vector j.
template <class T>
VSSM_INLINE void transpose_(Vec<T> (&square)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  VSSM_UNROLL
  for (int step = 1; step < W; step *= 2) {
    Vec<T> next[W];
    VSSM_UNROLL
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave<0>(square[i], square[i + W / 2], lanes);
      next[2 * i + 1] = interleave<W / 2>(square[i], square[i + W / 2], lanes);
    }
    VSSM_UNROLL
    for (int i = 0; i < W; ++i) square[i] = next[i];
  }
}

// out[j * lanes + i] = in[i * columns + j], i below `valid`; zero from there up to `lanes`.
template <class T>
void pack_columns(T* out, int64_t lanes, const T* in, int64_t columns, int64_t valid) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < columns; j += W)
    for (int64_t i = 0; i < lanes; i += W) {
      T* const to = out + j * lanes + i;
      const T* const from = in + i * columns + j;
      if (j + W <= columns && i + W <= valid) {
        Vec<T> square[W];
        VSSM_UNROLL
        for (int row = 0; row < W; ++row) square[row] = load(from + row * columns);
        transpose_<T>(square);
        VSSM_UNROLL
        for (int row = 0; row < W; ++row) store(to + row * lanes, square[row]);
        continue;
      }
      for (int64_t row = 0; row < at_most(W, columns - j); ++row)
        for (int64_t lane = 0; lane < W; ++lane)
          to[row * lanes + lane] = i + lane < valid ? from[lane * columns + row] : 0;
    }
}

template <class T>
void scan_pack(const ScanArgs<T>& s, const ScanParams<T>& from, T* packed, int64_t begin, int64_t end) {
  const int64_t K = s.num_orders, E = s.channels, N = s.states, R = s.rank, L = s.lanes, padded = s.rank_padded();
  for (int64_t task = begin; task < end; ++task) {
    const Block block(s, task / K);
    const int64_t row = task % K * E + block.channel;
    T *const A = packed + task * s.packed_size(), *const bias = A + N * L, *const D = bias + L, *const weight = D + L;
    T* const weight_t = weight + R * L;
    pack_columns(A, L, from.A + row * N, N, block.valid);
    for (int64_t l = 0; l < L; ++l) {
      const bool valid = l < block.valid;
      bias[l] = valid && from.bias ? from.bias[row + l] : 0;
      D[l] = 0;
      for (int64_t q = 0; valid && from.D && q < K; ++q) D[l] += from.D[q * E + block.channel + l];
      for (int64_t r = 0; r < padded; ++r) weight_t[l * padded + r] = valid && r < R ? from.weight[(row + l) * R + r] : 0;
    }
    if (R) pack_columns(weight, L, from.weight + row * R, R, block.valid);
  }
}

}  // namespace
}  // namespace vssm
