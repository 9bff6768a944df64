// SPDX-License-Identifier: Apache-2.0
// What has no recurrence in the selective scan: the step sizes and decays of a chunk, many positions at once.
//
// Results are written for a length that is rounded up to kTile positions: the buffers have room for that.
#pragma once

#include "functions.h"
#include "scan_block.h"

namespace vssm {
namespace {

// Positions whose steps are formed together: with two vectors of channels each they fill half of the registers.
constexpr int kTile = VSSM_VECTOR_BYTES == 64 ? 8 : 4;

VSSM_INLINE int64_t whole_tiles(int64_t length) { return (length + kTile - 1) / kTile * kTile; }

// Step sizes, d (length, lanes), and the derivative of softplus where `derivative` is given. The last position is
// repeated up to a whole tile.
template <class T, int NV>
void steps(const ScanArgs<T>& s, const Block<T>& block, int64_t k, Rows<const T> dt, int64_t length, T* d, T* derivative) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const T* weight = block.weight(k);
  const T* bias = block.bias(k);
  const int64_t rank = s.rank;
  for (int64_t t0 = 0; t0 < length; t0 += kTile) {
    const T* low[kTile];
    VSSM_UNROLL
    for (int p = 0; p < kTile; ++p) low[p] = dt[at_most(t0 + p, length - 1)];
    V raw[kTile * NV];
    VSSM_UNROLL
    for (int p = 0; p < kTile; ++p) {
      VSSM_UNROLL
      for (int v = 0; v < NV; ++v) raw[p * NV + v] = load(bias + v * W);
    }
    if (rank) {
      for (int64_t r = 0; r < rank; ++r) {
        V w[NV];
        VSSM_UNROLL
        for (int v = 0; v < NV; ++v) w[v] = load(weight + r * L + v * W);
        VSSM_UNROLL
        for (int p = 0; p < kTile; ++p) {
          VSSM_UNROLL
          for (int v = 0; v < NV; ++v) raw[p * NV + v] += w[v] * low[p][r];
        }
      }
    } else {
      for (int p = 0; p < kTile; ++p) {
        T row[L];
        gather(row, L, low[p], 0, 1, block.valid);
        VSSM_UNROLL
        for (int v = 0; v < NV; ++v) raw[p * NV + v] += load(row + v * W);
      }
    }
    VSSM_UNROLL
    for (int m = 0; m < kTile * NV; ++m) store(d + t0 * L + m * W, raw[m]);
  }
  const int64_t end = whole_tiles(length) * L;
  if (!s.softplus) {
    for (int64_t i = 0; derivative && i < end; i += W) store(derivative + i, splat(T(1)));
    return;
  }
  for (int64_t i = 0; i < end; i += kGroup * W) {
    V raw[kGroup], slope[kGroup];
    VSSM_UNROLL
    for (int m = 0; m < kGroup; ++m) raw[m] = load(d + i + m * W);
    softplus_<T>(raw, derivative ? slope : nullptr);
    VSSM_UNROLL
    for (int m = 0; m < kGroup; ++m) {
      store(d + i + m * W, raw[m]);
      if (derivative) store(derivative + i + m * W, slope[m]);
    }
  }
}

constexpr double kLog2E = 1.4426950408889634;

// Whether some decay of a chunk may be out of the reach of exp2_, as where a step is enormous. A step below 0, which is
// rare, is taken for one: its bits are the largest. So is a single state, where bounds cost no more than this does.
template <class T, int NV>
bool out_of_reach(const T* A, int64_t states, const T* d, int64_t length) {
  typedef Vec<T> V;
  typedef Bits<T> U;
  constexpr int W = kWidth<T>, L = NV * W;
  if (states == 1) return true;
  U step[NV] = {}, rate[NV] = {};
  for (int64_t t = 0; t < length; ++t) {
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) step[v] = at_least(step[v], (U)load(d + t * L + v * W));
  }
  for (int64_t n = 0; n < states; ++n) {
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) rate[v] = at_least(rate[v], (U)load(A + n * L + v * W) << 1 >> 1);  // without its sign
  }
  bool all = true;
  for (int v = 0; v < NV; ++v) {
    const V most = (V)step[v] * (V)rate[v] * T(kLog2E);
    for (int l = 0; l < W; ++l) all &= most[l] >= 0 && most[l] <= T(kExponent);
  }
  return !all;
}

// The decays of one state, a = exp(d A), (length, lanes); BOUNDED where they may be out of reach.
template <class T, int NV, bool BOUNDED>
void decays(const T* A, const T* d, int64_t length, T* a) {
  constexpr int W = kWidth<T>, L = NV * W;
  Vec<T> rate[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) rate[v] = load(A + v * W) * T(kLog2E);
  const int64_t end = whole_tiles(length) * L;
  for (int64_t i = 0; i < end; i += kGroup * W) {
    Vec<T> x[kGroup];
    VSSM_UNROLL
    for (int m = 0; m < kGroup; ++m) x[m] = load(d + i + m * W) * rate[m % NV];
    exp2_<BOUNDED>(x);
    VSSM_UNROLL
    for (int m = 0; m < kGroup; ++m) store(a + i + m * W, x[m]);
  }
}

}  // namespace
}  // namespace vssm
