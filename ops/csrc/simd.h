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

// Half types as vectors of their bits.
typedef uint16_t Halves __attribute__((vector_size(VSSM_VECTOR_BYTES / 2)));

VSSM_INLINE Halves load_bits(const void* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

VSSM_INLINE Vec<float> load(const Bfloat16* p) {
#if VSSM_VECTOR_BYTES == 64  // of the conversion GCC makes two halves
  const Bits<float> bits = (Bits<float>)_mm512_cvtepu16_epi32((__m256i)load_bits(p));
#elif VSSM_VECTOR_BYTES == 32
  const Bits<float> bits = (Bits<float>)_mm256_cvtepu16_epi32((__m128i)load_bits(p));
#else
  const Bits<float> bits = __builtin_convertvector(load_bits(p), Bits<float>);
#endif
  return (Vec<float>)(bits << 16);
}

// To the nearest, ties to even; any NaN becomes one.
VSSM_INLINE void store(Bfloat16* p, Vec<float> v) {
  const Bits<float> wide = (Bits<float>)v, rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  const Halves bits = __builtin_convertvector(v == v ? rounded : rounded * 0 + 0x7fc0, Halves);
  std::memcpy(p, &bits, sizeof bits);
}

#if VSSM_VECTOR_BYTES == 64
VSSM_INLINE Vec<float> load(const Float16* p) { return _mm512_cvtph_ps((__m256i)load_bits(p)); }
VSSM_INLINE void store(Float16* p, Vec<float> v) {
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &bits, sizeof bits);
}
#elif VSSM_VECTOR_BYTES == 32
VSSM_INLINE Vec<float> load(const Float16* p) { return _mm256_cvtph_ps((__m128i)load_bits(p)); }
VSSM_INLINE void store(Float16* p, Vec<float> v) {
  const __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &bits, sizeof bits);
}
#else
VSSM_INLINE Vec<float> load(const Float16* p) {
  typedef Bits<float> U;
  const U bits = __builtin_convertvector(load_bits(p), U), size = bits & 0x7fff;
  const U number = (U)((Vec<float>)(size << 13) * 0x1p112f);  // its exponent has another bias
  return (Vec<float>)((size < 0x7c00 ? number : 0x7f800000 | size << 13) | (bits & 0x8000) << 16);
}
VSSM_INLINE void store(Float16* p, Vec<float> v) {
  typedef Bits<float> U;
  const U wide = (U)v, size = wide & 0x7fffffff;
  const U number = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  const U small = (U)((Vec<float>)size + 0.5f) - 0x3f000000;  // the addition rounds to what float16 has below 2^-14
  U rounded = size < 113u << 23 ? small : number;
  rounded = size < 143u << 23 ? rounded : size * 0 + 0x7c00;
  rounded = v == v ? rounded : size * 0 + 0x7e00;
  const Halves bits = __builtin_convertvector(rounded | (wide >> 16 & 0x8000), Halves);
  std::memcpy(p, &bits, sizeof bits);
}
#endif

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

// Up to a vector: what lies beyond `valid` elements is zero.
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

template <class Half>
VSSM_INLINE Vec<float> load_half(const Half* p, int64_t valid) {
  Half part[kWidth<float>] = {};
  for (int64_t l = 0; l < valid; ++l) part[l] = p[l];
  return load(part);
}

template <class Half>
VSSM_INLINE void store_half(Half* p, Vec<float> v, int64_t valid) {
  Half part[kWidth<float>];
  store(part, v);
  for (int64_t l = 0; l < valid; ++l) p[l] = part[l];
}

// f(p), with p cast to the half type of what lies there; of a T that has none, nothing.
template <class T, class F>
VSSM_INLINE void as_half(Type type, const char* p, const F& f) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == Type::kBfloat16) f((Bfloat16*)p);
    else f((Float16*)p);
  }
}

// From and to a half type: `length` rows of `valid` elements, `step` bytes from one to the next. In T they are `lanes`
// wide, zero beyond the valid ones.
template <class T>
__attribute__((noinline)) void widen(T* to, int64_t lanes, const char* from, Type type, int64_t step, int64_t length,
                                     int64_t valid) {
  as_half<T>(type, from, [&](auto* p) {
    for (int64_t t = 0; t < length; ++t, to += lanes, p += step / int64_t(sizeof *p)) {
      int64_t l = 0;
      for (; l + kWidth<T> <= valid; l += kWidth<T>) store(to + l, load(p + l));
      for (; l < lanes; l += kWidth<T>) store(to + l, load_half(p + l, valid - l), lanes - l);
    }
  });
}

template <class T>
__attribute__((noinline)) void narrow(char* to, Type type, int64_t step, const T* from, int64_t from_step,
                                      int64_t length, int64_t valid) {
  as_half<T>(type, to, [&](auto* p) {
    for (int64_t t = 0; t < length; ++t, from += from_step, p += step / int64_t(sizeof *p)) {
      int64_t l = 0;
      for (; l + kWidth<T> <= valid; l += kWidth<T>) store(p + l, load(from + l));
      if (l < valid) store_half(p + l, load(from + l), valid - l);
    }
  });
}

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
VSSM_INLINE void scatter(T* to, int64_t step, const T* from, int64_t from_step, int64_t lanes, int64_t length,
                         int64_t valid) {
  if (valid == lanes) {
    for (int64_t t = 0; t < length; ++t, to += step, from += from_step)
      for (int64_t l = 0; l < lanes; l += kWidth<T>) store(to + l, load(from + l));
    return;
  }
  for (int64_t t = 0; t < length; ++t, to += step, from += from_step)
    for (int64_t l = 0; l < valid; ++l) to[l] = from[l];
}

// The same from and to a tensor as it lies, its step in bytes.
template <class T>
VSSM_INLINE void gather(T* to, int64_t lanes, const char* from, Type type, int64_t step, int64_t length,
                        int64_t valid) {
  if (type != Type::kWhole) return widen(to, lanes, from, type, step, length, valid);
  gather(to, lanes, reinterpret_cast<const T*>(from), step / int64_t(sizeof(T)), length, valid);
}

template <class T>
VSSM_INLINE void scatter(char* to, Type type, int64_t step, const T* from, int64_t from_step, int64_t lanes,
                         int64_t length, int64_t valid) {
  if (type != Type::kWhole) return narrow(to, type, step, from, from_step, length, valid);
  scatter(reinterpret_cast<T*>(to), step / int64_t(sizeof(T)), from, from_step, lanes, length, valid);
}

}  // namespace
}  // namespace vssm
