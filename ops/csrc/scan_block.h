// SPDX-License-Identifier: Apache-2.0
// A block of channels of the selective scan: which they are, and their parameters as the kernels read them.
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

// A block of channels. Lanes beyond the valid ones begin as zeros, but may come to hold anything, since B, C and low-rank
// steps that are not finite meet them too: nothing may read them.
//
// Its parameters are packed by the task that works on it, into its scratch: so they are in the first-level cache when
// they are read, and one image waits for no pass over the weights.
template <class T>
struct Block {
  const ScanArgs<T>& s;
  const int64_t index, channel, valid;  // `channel` is its first one
  // By order: A (N, lanes), bias (lanes), D summed over the orders (lanes), weight (R, lanes), and for the backward
  // alone its transpose (lanes, rank_padded).
  const T* const packed;
  const int64_t size;

  static VSSM_INLINE int64_t rank_padded(const ScanArgs<T>& s) { return (s.rank + 15) / 16 * 16; }
  static int64_t size_of_order(const ScanArgs<T>& s, bool backward) {
    return (s.states + 2 + s.rank + (backward ? rank_padded(s) : 0)) * s.lanes;
  }

  Block(const ScanArgs<T>& s, int64_t index, bool backward, T* room)
      : s(s), index(index), channel(index * s.lanes), valid(at_most(s.lanes, s.channels - channel)), packed(room),
        size(size_of_order(s, backward)) {
    const int64_t N = s.states, R = s.rank, L = s.lanes;
    for (int64_t k = 0; k < s.num_orders; ++k, room += size) {
      const int64_t row = k * s.channels + channel;
      pack_columns(room, L, s.A + row * N, N, valid);
      T *const bias = room + N * L, *const D = bias + L, *const weight = D + L;
      std::memset(bias, 0, 2 * L * sizeof(T));
      for (int64_t l = 0; s.bias && l < valid; ++l) bias[l] = s.bias[row + l];
      for (int64_t q = 0; s.D && q < s.num_orders; ++q)
        for (int64_t l = 0; l < valid; ++l) D[l] += s.D[q * s.channels + channel + l];
      if (!R) continue;
      pack_columns(weight, L, s.weight + row * R, R, valid);
      if (!backward) continue;
      T* const weight_t = weight + R * L;
      std::memset(weight_t, 0, L * rank_padded(s) * sizeof(T));
      for (int64_t l = 0; l < valid; ++l)
        std::memcpy(weight_t + l * rank_padded(s), s.weight + (row + l) * R, R * sizeof(T));
    }
  }

  VSSM_INLINE const T* A(int64_t k) const { return packed + k * size; }
  VSSM_INLINE const T* bias(int64_t k) const { return A(k) + s.states * s.lanes; }
  VSSM_INLINE const T* D(int64_t k) const { return bias(k) + s.lanes; }
  VSSM_INLINE const T* weight(int64_t k) const { return D(k) + s.lanes; }
  VSSM_INLINE const T* weight_t(int64_t k) const { return weight(k) + s.rank * s.lanes; }
};

}  // namespace
}  // namespace vssm
