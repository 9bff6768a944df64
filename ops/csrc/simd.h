// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set. A file that defines VSSM_VECTOR_BYTES and selects the instructions includes this, and
// kernels on top of it, once. Nothing of theirs may be shared between those files by the linker, or a CPU would meet
// instructions that it does not have: hence the unnamed namespace, and no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define VSSM_UNROLL _Pragma("GCC unroll 64")
#else
#define VSSM_UNROLL _Pragma("unroll")
#endif

namespace vssm {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(VSSM_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VSSM_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(VSSM_VECTOR_BYTES)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(VSSM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VSSM_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(VSSM_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using Int = typename Simd<T>::I;
template <class T>
using Bits = typename Simd<T>::U;
template <class T>
constexpr int kWidth = VSSM_VECTOR_BYTES / sizeof(T);
template <class T>
VSSM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
VSSM_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
VSSM_INLINE Vec<T> splat(T s) {
  Vec<T> v;
  for (int i = 0; i < kWidth<T>; ++i) v[i] = s;
  return v;
}

VSSM_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// x within a bound; a NaN stays one.
template <class V>
VSSM_INLINE V at_least(V x, V lo) {
  return x < lo ? lo : x;
}
template <class V>
VSSM_INLINE V at_most(V x, V hi) {
  return x > hi ? hi : x;
}
#if defined(__x86_64__)  // one instruction, of which GCC makes a comparison and a blend
#if VSSM_VECTOR_BYTES == 64
#define VSSM_X86(name) _mm512_##name##_ps
#elif VSSM_VECTOR_BYTES == 32
#define VSSM_X86(name) _mm256_##name##_ps
#else
#define VSSM_X86(name) _mm_##name##_ps
#endif
VSSM_INLINE Vec<float> at_least(Vec<float> x, Vec<float> lo) { return VSSM_X86(max)(lo, x); }
VSSM_INLINE Vec<float> at_most(Vec<float> x, Vec<float> hi) { return VSSM_X86(min)(hi, x); }
#undef VSSM_X86
#endif

// A chunk of channels, `lanes` wide, a multiple of the vector, and zero beyond `valid`, from and to a tensor.
template <class T>
VSSM_INLINE void gather(T* to, int64_t lanes, const T* from, int64_t step, int64_t length, int64_t valid) {
  if (valid == lanes) {
    for (int64_t t = 0; t < length; ++t, to += lanes, from += step)
      for (int64_t l = 0; l < lanes; l += kWidth<T>) store(to + l, load(from + l));
    return;
  }
  for (int64_t t = 0; t < length; ++t, to += lanes, from += step) {
    for (int64_t l = 0; l < valid; ++l) to[l] = from[l];
    for (int64_t l = valid; l < lanes; ++l) to[l] = 0;
  }
}

template <class T>
VSSM_INLINE void scatter(T* to, int64_t step, const T* from, int64_t lanes, int64_t length, int64_t valid) {
  if (valid == lanes) {
    for (int64_t t = 0; t < length; ++t, to += step, from += lanes)
      for (int64_t l = 0; l < lanes; l += kWidth<T>) store(to + l, load(from + l));
    return;
  }
  for (int64_t t = 0; t < length; ++t, to += step, from += lanes)
    for (int64_t l = 0; l < valid; ++l) to[l] = from[l];
}

}  // namespace
}  // namespace vssm
