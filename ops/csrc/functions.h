// SPDX-License-Identifier: Apache-2.0
// exp, softplus and sigmoid for one instruction set, see simd.h: several vectors at once, one operation after the other
// over all of them, so that their latencies overlap. Arguments are held within the range of normal numbers; a NaN stays
// one.
#pragma once

#include "simd.h"

namespace vssm {
namespace {

// Vectors that go through a polynomial together: enough to overlap latencies, few enough to stay in registers.
constexpr int kGroup = 4;

// exp(x) = 2^n (1 + r + r^2 q(r)), q minimax on |r| <= ln(2) / 2: relative error below 1e-7.
template <int M>
VSSM_INLINE void exp_(Vec<float> (&x)[M]) {
  typedef Vec<float> V;
  typedef Int<float> I;
  const V lo = splat(-87.3f), hi = splat(88.3f);
  const V to_int = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer, in the low bits
  V r[M], z[M], p[M];
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) {
    x[m] = at_most(at_least(x[m], lo), hi);
    z[m] = x[m] * 1.442695041f + to_int;
  }
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) {
    const V n = z[m] - to_int;
    r[m] = x[m] - n * 0.693359375f;
    r[m] = r[m] + n * 2.12194440e-4f;
    p[m] = r[m] * 1.390128535e-3f + 8.363141483e-3f;
  }
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) p[m] = p[m] * r[m] + 4.166685336e-2f;
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) p[m] = p[m] * r[m] + 1.666657731e-1f;
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) p[m] = p[m] * r[m] + 0.5f;
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) p[m] = p[m] * r[m] + 1.f;
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) p[m] = p[m] * r[m] + 1.f;  // exactly 1 at r = 0: near a = 1, 1 / (1 - a) amplifies errors
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) x[m] = (V)((I)p[m] + ((I)z[m] << 23));
}

template <int M>
VSSM_INLINE void exp_(Vec<double> (&x)[M]) {
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < kWidth<double>; ++i) x[m][i] = __builtin_exp(x[m][i]);
}

// 2^x = 2^n (1 + r q(r)), |r| <= 1/2, q of minimal error relative to 1 - 2^x, below 4e-7: that is what a recurrence
// amplifies. For decays near 1 the rounding of float32 does worse. Unless BOUNDED, |x| must be at most kExponent; what is
// within comes out the same either way, bit by bit, since bounds come after the product that the caller made of x, which
// the compiler may fuse with what follows.
constexpr int kExponent = 126;

template <bool BOUNDED, int M>
VSSM_INLINE void exp2_(Vec<float> (&x)[M]) {
  typedef Vec<float> V;
  typedef Int<float> I;
  const V to_int = splat(12582912.f);  // as in exp_
  const V least = splat(12582912.f - kExponent), most = splat(12582912.f + kExponent);
  const float c[] = {9.665856775e-03f, 5.550922573e-02f, 2.402236820e-01f, 6.931469671e-01f, 1.f};
  V z[M], p[M];
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) {
    z[m] = x[m] + to_int;
    x[m] -= z[m] - to_int;
    if (BOUNDED) {
      x[m] = at_most(at_least(x[m], splat(-0.5f)), splat(0.5f));
      z[m] = at_most(at_least(z[m], least), most);
    }
    p[m] = splat(1.318679360e-03f);
  }
  VSSM_UNROLL
  for (int i = 0; i < 5; ++i) {
    VSSM_UNROLL
    for (int m = 0; m < M; ++m) p[m] = p[m] * x[m] + c[i];  // exactly 1 at r = 0
  }
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) x[m] = (V)((I)p[m] + ((I)z[m] << 23));
}

template <bool BOUNDED, int M>
VSSM_INLINE void exp2_(Vec<double> (&x)[M]) {
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < kWidth<double>; ++i) x[m][i] = __builtin_exp2(x[m][i]);
}

// log(1 + u) = u q(u), q minimax on 0 <= u <= 1: relative error below 2e-7.
template <int M>
VSSM_INLINE void log1p_(Vec<float> (&u)[M]) {
  Vec<float> p[M];
  const float c[] = {7.822593340e-02f, -1.366324423e-01f, 1.910600602e-01f, -2.484298202e-01f,
                     3.331909678e-01f, -4.999949314e-01f, 9.999999699e-01f};
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) p[m] = u[m] * 5.232691435e-03f + -2.950522743e-02f;
  VSSM_UNROLL
  for (int i = 0; i < 7; ++i) {
    VSSM_UNROLL
    for (int m = 0; m < M; ++m) p[m] = p[m] * u[m] + c[i];
  }
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) u[m] *= p[m];
}

template <int M>
VSSM_INLINE void log1p_(Vec<double> (&u)[M]) {
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < kWidth<double>; ++i) u[m][i] = __builtin_log1p(u[m][i]);
}

// v <- softplus(v) = max(v, 0) + log(1 + exp(-|v|)); where `derivative` is given, it becomes sigmoid(v).
template <class T, int M>
VSSM_INLINE void softplus_(Vec<T> (&v)[M], Vec<T>* derivative) {
  typedef Vec<T> V;
  const V zero = V{};
  V u[M];
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) u[m] = at_most(v[m], -v[m]);
  exp_(u);
  if (sizeof(T) == 8) {  // v itself beyond 20, as PyTorch has it; float32 rounds to that anyway
    for (int m = 0; m < M; ++m) u[m] = v[m] > zero + T(20) ? zero : u[m];
  }
  if (derivative) {
    VSSM_UNROLL
    for (int m = 0; m < M; ++m) derivative[m] = (v[m] > zero ? zero + T(1) : u[m]) / (u[m] + T(1));
  }
  log1p_(u);
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) v[m] = at_least(v[m], zero) + u[m];
}

// v <- sigmoid(v)
template <class T, int M>
VSSM_INLINE void sigmoid_(Vec<T> (&v)[M]) {
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) v[m] = -v[m];
  exp_(v);
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) v[m] = T(1) / (v[m] + T(1));
}

}  // namespace
}  // namespace vssm
