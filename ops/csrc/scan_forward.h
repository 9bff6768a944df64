// SPDX-License-Identifier: Apache-2.0
// The forward pass of the selective scan for one instruction set, see simd.h.
#pragma once

#include "scan_steps.h"

namespace vssm {
namespace {

// What runs along a line of the walk and what from one line to the next. A 2-D order goes along the rows in either
// form, for its two recurrences may change places: nothing strides through memory, and orders of one direction share a
// pass.
enum class Form { k1d, k2dRows, k2dColumns };

// What the recurrence reads and writes over a chunk; without a shape it is (length, lanes).
template <class T>
struct ForwardChunk {
  int64_t length, states;
  Rows<const T> x;
  const T* d;          // step sizes
  T* a;                // room for the decays of one state
  const T* A;          // (states, lanes)
  Rows<const T> B, C;  // the numbers of the states, one after the other
  T* carry;            // (states, lanes): those at the previous position of the line; the last one's afterwards
  T* row;              // (length, states, lanes): in 2-D those of the previous line; this line's afterwards
  Rows<T> y;           // the sum over the states is added to its present value, or
  const T* D;          // (lanes): where it is not null, to D x
};

// The state after a position: `input` is d x B, `along` the state before it in the line, `row` in 2-D the states in the
// line before, which it takes the place of.
template <Form FORM, class V, class T>
VSSM_INLINE V next_state(V a, V input, V& along, T* row) {
  V h = input;
  if (FORM == Form::k2dColumns) {
    h += a * load(row);
    store(row, h);
  }
  h += a * along;
  along = h;
  if (FORM == Form::k2dRows) {
    h += a * load(row);
    store(row, h);
  }
  return h;
}

// A single state: first its decays, for many positions at once, then the recurrence alone.
template <class T, int NV, Form FORM>
VSSM_INLINE void scan_state(const ForwardChunk<T>& c) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  decays<T, NV, true>(c.A, c.d, c.length, c.a);
  V along[NV], skip[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    along[v] = load(c.carry + v * W);
    skip[v] = c.D ? load(c.D + v * W) : V{};
  }
  for (int64_t t = 0; t < c.length; ++t) {
    const T Bt = *c.B[t], Ct = *c.C[t];
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V x = load(c.x[t] + v * W);
      const V h = next_state<FORM>(load(c.a + i), load(c.d + i) * (x * Bt), along[v], c.row + i);
      T* const y = c.y[t] + v * W;
      store(y, h * Ct + (c.D ? skip[v] * x : load(y)));
    }
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) store(c.carry + v * W, along[v]);
}

// 2^(rate step) of M / NV states.
template <bool BOUNDED, class T, int NV, int M>
VSSM_INLINE void decay(const T* rate, const Vec<T> (&step)[NV], Vec<T> (&a)[M]) {
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) a[m] = load(rate + m * kWidth<T>) * step[m % NV];
  exp2_<BOUNDED>(a);
}

// G of many states, from the n-th on, at position t, decays included: so neither these nor partial sums go through
// memory. `step` is d / ln(2), for a = exp(d A) = 2^(step A). A branch rather than a function of its own for bounded
// decays, so that the recurrence is rounded alike: what other channels hold must not show.
template <class T, int NV, Form FORM, int G>
VSSM_INLINE void advance(const ForwardChunk<T>& c, bool bounded, int64_t t, int64_t n, const Vec<T> (&step)[NV],
                         const Vec<T> (&dx)[NV], Vec<T> (&y)[NV]) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W, M = G * NV;
  const T *A = c.A + n * L, *B = c.B[t] + n, *C = c.C[t] + n;
  T *carry = c.carry + n * L, *row = c.row + (t * c.states + n) * L;
  T Bt[G], Ct[G];  // read before anything is written
  VSSM_UNROLL
  for (int g = 0; g < G; ++g) Bt[g] = B[g], Ct[g] = C[g];
  V a[M];
  if (bounded) decay<true, T>(A, step, a);
  else decay<false, T>(A, step, a);
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) {
    V along = load(carry + m * W);
    const V h = next_state<FORM>(a[m], dx[m % NV] * Bt[m / NV], along, row + m * W);
    store(carry + m * W, along);
    y[m % NV] += h * Ct[m / NV];
  }
}

template <class T, int NV, Form FORM>
VSSM_INLINE void scan_states(const ForwardChunk<T>& c, bool bounded) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W, G = kGroup / NV;
  for (int64_t t = 0; t < c.length; ++t) {
    V step[NV], dx[NV], y[NV];
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const V d = load(c.d + t * L + v * W), x = load(c.x[t] + v * W);
      step[v] = d * T(kLog2E);
      dx[v] = d * x;
      y[v] = c.D ? load(c.D + v * W) * x : load(c.y[t] + v * W);
    }
    int64_t n = 0;
    for (; n + G <= c.states; n += G) advance<T, NV, FORM, G>(c, bounded, t, n, step, dx, y);
    for (; n < c.states; ++n) advance<T, NV, FORM, 1>(c, bounded, t, n, step, dx, y);
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) store(c.y[t] + v * W, y[v]);
  }
}

template <class T, int NV, Form FORM>
void scan_chunk(const ForwardChunk<T>& chunk) {
  const ForwardChunk<T> c = chunk;  // a copy, which no store can change: what it says may stay in registers
  if (c.states == 1) scan_state<T, NV, FORM>(c);
  else scan_states<T, NV, FORM>(c, out_of_reach<T, NV>(c.A, c.states, c.d, c.length));
}

// The order in which a walk's chunks follow one another. In 2-D, what one line leaves to the next is a state for each of
// its positions. Where lines are long and few, all lines are walked up to the end of their first chunk, then on to that
// of their second: then a chunk's states will do for a line's, and each line keeps the state at which it stopped.
struct Chunks {
  const int64_t outer, inner, per_line;
  const bool strips;

  Chunks(const Walk& walk, int ndim)
      : outer(walk.outer), inner(walk.inner), per_line((inner + kChunk - 1) / kChunk),
        strips(ndim == 2 && outer + kChunk < inner) {}

  VSSM_INLINE int64_t count() const { return outer * per_line; }
  VSSM_INLINE int64_t line(int64_t chunk) const { return strips ? chunk % outer : chunk / per_line; }
  VSSM_INLINE int64_t position(int64_t chunk) const {
    return (strips ? chunk / outer : chunk % per_line) * kChunk;
  }
  VSSM_INLINE int64_t carries() const { return strips ? outer : 1; }
  VSSM_INLINE int64_t row() const { return strips ? kChunk : inner; }
};

// The end of the orders of one pass, which begins with order `begin`: in 2-D those of one direction.
template <class T>
int64_t pass_end(const ScanArgs<T>& s, int64_t begin) {
  int64_t end = begin + 1;
  while (s.ndim == 2 && end < s.num_orders && s.orders[end] / 2 == s.orders[begin] / 2) ++end;
  return end;
}

// Whether y cannot be summed where it lies: in a half type, or in lanes that it does not have.
template <class T>
bool is_summed_apart(const ScanArgs<T>& s) {
  return s.x.type != Type::kWhole || s.channels % s.lanes;
}

// What one task works in, laid out in its scratch.
template <class T>
struct ForwardScratch {
  T *d, *a, *x;       // a chunk of positions each
  T* y;               // what y is summed in before it is rounded: a chunk of it, or where it takes several passes all
  T *carries, *rows;  // by order, as `Chunks` has them, each with all states
  T* packed;          // the block's parameters
  int64_t size;

  ForwardScratch(const ScanArgs<T>& s, T* base) {
    T* next = base;
    auto take = [&](int64_t rows) {
      T* p = next;
      next += rows * s.lanes;
      return p;
    };
    T** chunk[] = {&d, &a, &x};
    for (T** p : chunk) *p = take(kChunk);
    y = take(is_summed_apart(s) && pass_end(s, 0) < s.num_orders ? s.positions() : kChunk);
    const Chunks chunks(Walk(s, 0, s.ndim == 2), s.ndim);
    carries = take(s.num_orders * s.states * chunks.carries());
    rows = take(s.ndim == 2 ? s.num_orders * s.states * chunks.row() : 0);
    packed = next;
    size = packed - base + s.num_orders * Block<T>::size_of_order(s, false);
  }
};

template <class T>
int64_t scan_forward_scratch(const ScanArgs<T>& s) {
  return ForwardScratch<T>(s, nullptr).size;
}

// One image and block of channels, along all orders.
template <class T, int NV, int NDIM>
void forward_block(const ScanArgs<T>& s, char* y_data, const ForwardScratch<T>& w, int64_t image,
                   const Block<T>& block) {
  constexpr int64_t L = NV * kWidth<T>;
  const Type type = s.x.type;
  const int64_t valid = block.valid, bytes = size_of<T>(type), cell = s.channels * bytes;
  const Map<char> y_map{y_data, s.positions() * cell, s.width * cell, cell, 0};
  const Map<T> sums_map{w.y, 0, s.width * L, L, 0};
  const bool apart = type != Type::kWhole || valid < L;

  for (int64_t begin = 0, end; begin < s.num_orders; begin = end) {
    // The orders of one pass, and what each of them walks along.
    const Walk walk(s, begin, NDIM == 2);
    end = pass_end(s, begin);
    const Chunks chunks(walk, NDIM);
    const int64_t orders = end - begin, state_size = s.states * L;
    const int64_t carry_size = chunks.carries() * state_size, row_size = chunks.row() * state_size;
    const auto x = walk.line<const char>(s.x, image, 0, block.channel * bytes);
    const auto y = walk.line(y_map, image, 0, block.channel * bytes);
    const auto sums = walk.line(sums_map, 0, 0);
    const bool is_last = end == s.num_orders, is_only = is_last && begin == 0;
    std::memset(w.carries, 0, orders * carry_size * sizeof(T));
    if (NDIM == 2) std::memset(w.rows, 0, orders * row_size * sizeof(T));

    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
      const int64_t i = chunks.line(chunk), j = chunks.position(chunk);
      if (NDIM == 2 && !chunks.strips && j == 0) std::memset(w.carries, 0, orders * carry_size * sizeof(T));
      if (NDIM == 2 && chunks.strips && i == 0) std::memset(w.rows, 0, orders * row_size * sizeof(T));
      ForwardChunk<T> c;
      c.length = at_most(kChunk, walk.inner - j);
      if (apart) {
        gather(w.x, L, x.at(i, j), type, x.inner, c.length, valid);
        c.x = {w.x, L}, c.y = is_only ? Rows<T>{w.y, L} : sums.rows(i, j);
      } else {
        c.x = {reinterpret_cast<const T*>(x.at(i, j)), x.inner / int64_t(sizeof(T))};
        c.y = {reinterpret_cast<T*>(y.at(i, j)), y.inner / int64_t(sizeof(T))};
      }
      c.states = s.states, c.d = w.d, c.a = w.a;
      c.carry = w.carries + (chunks.strips ? i * state_size : 0);
      c.row = w.rows + (chunks.strips ? 0 : j * state_size);
      for (int64_t k = begin; k < end; ++k) {
        const auto scan = NDIM == 1              ? scan_chunk<T, NV, Form::k1d>
                          : s.orders[k] % 2 == 0 ? scan_chunk<T, NV, Form::k2dRows>
                                                 : scan_chunk<T, NV, Form::k2dColumns>;
        const auto dt = walk.line(s.dt, image, k, s.rank ? 0 : block.channel).rows(i, j);
        steps<T, NV>(s, block, k, dt, c.length, w.d, nullptr);
        c.B = walk.line(s.B, image, k).rows(i, j);
        c.C = walk.line(s.C, image, k).rows(i, j);
        c.D = k == 0 ? block.D(0) : nullptr;
        c.A = block.A(k);
        scan(c);
        c.carry += carry_size, c.row += row_size;
      }
      if (apart && is_last) scatter(y.at(i, j), type, y.inner, c.y.data, c.y.step, L, c.length, valid);
    }
  }
}

template <class T, int NV>
void forward_tasks(const ScanArgs<T>& s, char* y, T* scratch, int64_t begin, int64_t end) {
  // Blocks inside, images outside, so that what all channels of a position share is read from the cache. Of small maps
  // a few images fit there: then these are inside, so that the parameters of a block are packed once for all.
  constexpr int64_t kCacheBytes = 1 << 18;
  const int64_t shared = s.positions() * s.num_orders * ((s.rank ? s.rank : s.lanes) + 2 * s.states) * sizeof(T);
  const int64_t together = at_most(s.batch, 1 + kCacheBytes / shared), blocks = s.num_blocks();
  const ForwardScratch<T> w(s, scratch);
  const auto forward = s.ndim == 1 ? forward_block<T, NV, 1> : forward_block<T, NV, 2>;
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t first = task / (together * blocks) * together, images = at_most(together, s.batch - first);
    const int64_t within = task - first * blocks;
    const Block<T> block(s, within / images, false, w.packed);
    next = at_most(end, task + images - within % images);
    for (int64_t t = task; t < next; ++t) forward(s, y, w, first + (t - first * blocks) % images, block);
  }
}

template <class T>
void scan_forward(const ScanArgs<T>& s, char* y, T* scratch, int64_t begin, int64_t end) {
  (s.lanes == kWidth<T> ? forward_tasks<T, 1> : forward_tasks<T, 2>)(s, y, scratch, begin, end);
}

}  // namespace
}  // namespace vssm
