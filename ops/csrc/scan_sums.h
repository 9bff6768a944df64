// SPDX-License-Identifier: Apache-2.0
// The sums of the backward scan over the channels of a block and over the positions of a chunk.
#pragma once

#include "scan_steps.h"

namespace vssm {
namespace {

// to[t] = the sum of vector t, or where `add` its present value and that sum.
template <class T>
void sum_vectors(Rows<T> to, bool add, const T* vectors, int64_t length) {
  constexpr int W = kWidth<T>;
  for (int64_t t = 0; t < length; ++t, vectors += W, to.data += to.step) {
    T part[W];
    std::memcpy(part, vectors, sizeof part);
    VSSM_UNROLL
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    *to.data = add ? *to.data + part[0] : part[0];
  }
}

// The gradient of low-rank steps, to[t, r] = the sum over the valid lanes of draw[t, lane] weight_t[lane, r], or where
// `add` its present value and that sum.
template <class T, int L>
void step_gradient(Rows<T> to, bool add, const T* draw, int64_t length, int64_t valid, const T* weight_t, int64_t rank,
                   int64_t rank_padded) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>;
  for (int64_t t0 = 0; t0 < length; t0 += kTile) {
    const T* row[kTile];
    VSSM_UNROLL
    for (int p = 0; p < kTile; ++p) row[p] = draw + at_most(t0 + p, length - 1) * L;
    for (int64_t r0 = 0; r0 < rank; r0 += W) {
      V sum[kTile] = {};
      for (int64_t l = 0; l < valid; ++l) {
        const V w = load(weight_t + l * rank_padded + r0);
        VSSM_UNROLL
        for (int p = 0; p < kTile; ++p) sum[p] += w * row[p][l];
      }
      const int64_t ranks = at_most(W, rank - r0), positions = at_most(kTile, length - t0);
      for (int64_t p = 0; p < positions; ++p) {
        T part[W];
        store(part, sum[p]);
        T* out = to[t0 + p] + r0;
        for (int64_t r = 0; r < ranks; ++r) out[r] = add ? out[r] + part[r] : part[r];
      }
    }
  }
}

// The gradient of the step weight: to[r, lane] += the sum over positions of low[t, r] draw[t, lane].
template <class T, int NV>
void weight_gradient(T* to, const T* draw, Rows<const T> low, int64_t length, int64_t rank) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W, kRanks = 4;
  for (int64_t r0 = 0; r0 < rank; r0 += kRanks) {
    V sum[kRanks * NV] = {};
    int64_t r[kRanks];
    VSSM_UNROLL
    for (int q = 0; q < kRanks; ++q) r[q] = at_most(r0 + q, rank - 1);
    for (int64_t t = 0; t < length; ++t) {
      VSSM_UNROLL
      for (int v = 0; v < NV; ++v) {
        const V dr = load(draw + t * L + v * W);
        VSSM_UNROLL
        for (int q = 0; q < kRanks; ++q) sum[q * NV + v] += dr * low[t][r[q]];
      }
    }
    for (int q = 0; q < at_most(kRanks, rank - r0); ++q)
      for (int v = 0; v < NV; ++v) {
        T* out = to + (r0 + q) * L + v * W;
        store(out, load(out) + sum[q * NV + v]);
      }
  }
}

}  // namespace
}  // namespace vssm
