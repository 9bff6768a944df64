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

// What the recurrence of one state reads and writes over a chunk; without a shape it is (length, lanes).
template <class T>
struct ForwardChunk {
  int64_t length;
  Rows<const T> x;
  const T *d, *a;      // step sizes and decays
  Rows<const T> B, C;  // one number a position
  T* carry;            // (lanes): the state at the previous position of the line; the last one's afterwards
  T* row;              // in 2-D the states of the previous line; this line's afterwards
  bool first, last;    // of the states
  T* partial;          // the sum of C h over the states up to this one
  Rows<T> y;           // the sum over all states is added to its present value, or
  const T* D;          // (lanes): where it is not null, to D x
};

template <class T, int NV, Form FORM>
void scan_chunk(const ForwardChunk<T>& chunk) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const ForwardChunk<T> c = chunk;  // a copy, which no store can change: what it says may stay in registers
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
      const V at = load(c.a + i), xt = load(c.x[t] + v * W);
      V h = load(c.d + i) * (xt * Bt);
      if (FORM == Form::k2dColumns) {
        h += at * load(c.row + i);
        store(c.row + i, h);
      }
      h += at * along[v];
      along[v] = h;
      if (FORM == Form::k2dRows) {
        h += at * load(c.row + i);
        store(c.row + i, h);
      }
      V out = h * Ct;
      if (!c.first) out += load(c.partial + i);
      if (!c.last) {
        store(c.partial + i, out);
      } else {
        T* yt = c.y[t] + v * W;
        store(yt, out + (c.D ? skip[v] * xt : load(yt)));
      }
    }
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) store(c.carry + v * W, along[v]);
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

// What one task works in, laid out in its scratch.
template <class T>
struct ForwardScratch {
  T *d, *a, *partial, *x, *y;  // a chunk of positions each
  T *carries, *rows;           // by order and state, as `Chunks` has them
  int64_t size;

  ForwardScratch(const ScanArgs<T>& s, T* base) {
    T* next = base;
    auto take = [&](int64_t rows) {
      T* p = next;
      next += rows * s.lanes;
      return p;
    };
    T** chunk[] = {&d, &a, &partial, &x, &y};
    for (T** p : chunk) *p = take(kChunk);
    const Chunks chunks(Walk(s, 0, s.ndim == 2), s.ndim);
    carries = take(s.num_orders * s.states * chunks.carries());
    rows = take(s.ndim == 2 ? s.num_orders * s.states * chunks.row() : 0);
    size = next - base;
  }
};

template <class T>
int64_t scan_forward_scratch(const ScanArgs<T>& s) {
  return ForwardScratch<T>(s, nullptr).size;
}

// One image and block of channels, along all orders.
template <class T, int NV, int NDIM>
void forward_block(const ScanArgs<T>& s, T* y_data, const ForwardScratch<T>& w, int64_t image, const Block& block) {
  constexpr int64_t L = NV * kWidth<T>;
  const int64_t channel = block.channel, valid = block.valid;
  const Map<T> y_map{y_data, s.height * s.width * s.channels, s.width * s.channels, s.channels, 0};

  for (int64_t begin = 0, end; begin < s.num_orders; begin = end) {
    // The orders of one pass, and what each of them walks along.
    const Walk walk(s, begin, NDIM == 2);
    end = begin + 1;
    while (NDIM == 2 && end < s.num_orders && Walk(s, end, true).reversed == walk.reversed) ++end;
    const Chunks chunks(walk, NDIM);
    const int64_t states = (end - begin) * s.states;
    const int64_t carry_size = chunks.carries() * L, row_size = chunks.row() * L;
    const auto x = walk.line(s.x, image, 0, channel);
    const auto y = walk.line(y_map, image, 0, channel);
    std::memset(w.carries, 0, states * carry_size * sizeof(T));
    if (NDIM == 2) std::memset(w.rows, 0, states * row_size * sizeof(T));

    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
      const int64_t i = chunks.line(chunk), j = chunks.position(chunk);
      if (NDIM == 2 && !chunks.strips && j == 0) std::memset(w.carries, 0, states * carry_size * sizeof(T));
      if (NDIM == 2 && chunks.strips && i == 0) std::memset(w.rows, 0, states * row_size * sizeof(T));
      ForwardChunk<T> c;
      c.length = at_most(kChunk, walk.inner - j);
      c.x = x.rows(i, j), c.y = y.rows(i, j);
      if (valid < L) {
        gather(w.x, L, c.x.data, c.x.step, c.length, valid);
        if (begin > 0) gather(w.y, L, c.y.data, c.y.step, c.length, valid);
        c.x = {w.x, L}, c.y = {w.y, L};
      }
      c.d = w.d, c.a = w.a, c.partial = w.partial;
      c.carry = w.carries + (chunks.strips ? i * L : 0), c.row = w.rows + (chunks.strips ? 0 : j * L);
      for (int64_t k = begin; k < end; ++k) {
        const auto scan = NDIM == 1              ? scan_chunk<T, NV, Form::k1d>
                          : s.orders[k] % 2 == 0 ? scan_chunk<T, NV, Form::k2dRows>
                                                 : scan_chunk<T, NV, Form::k2dColumns>;
        const auto dt = walk.line(s.dt, image, k, s.rank ? 0 : channel).rows(i, j);
        steps<T, NV>(s, block, k, dt, c.length, w.d, nullptr);
        c.B = walk.line(s.B, image, k).rows(i, j);
        c.C = walk.line(s.C, image, k).rows(i, j);
        c.D = k == 0 ? s.D(block.index, 0) : nullptr;
        for (int64_t n = 0; n < s.states; ++n) {
          c.first = n == 0, c.last = n == s.states - 1;
          decays<T, NV>(s.A(block.index, k) + n * L, w.d, c.length, w.a);
          scan(c);
          ++c.B.data, ++c.C.data, c.carry += carry_size, c.row += row_size;
        }
      }
      if (valid < L) scatter(y.at(i, j), y.inner, w.y, L, c.length, valid);
    }
  }
}

template <class T, int NV>
void forward_tasks(const ScanArgs<T>& s, T* y, T* scratch, int64_t begin, int64_t end) {
  const ForwardScratch<T> w(s, scratch);
  const int64_t blocks = s.num_blocks();
  const auto block = s.ndim == 1 ? forward_block<T, NV, 1> : forward_block<T, NV, 2>;
  for (int64_t task = begin; task < end; ++task) block(s, y, w, task / blocks, Block(s, task % blocks));
}

template <class T>
void scan_forward(const ScanArgs<T>& s, T* y, T* scratch, int64_t begin, int64_t end) {
  (s.lanes == kWidth<T> ? forward_tasks<T, 1> : forward_tasks<T, 2>)(s, y, scratch, begin, end);
}

}  // namespace
}  // namespace vssm
