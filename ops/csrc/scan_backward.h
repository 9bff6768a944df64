// SPDX-License-Identifier: Apache-2.0
// The backward pass of the selective scan for one instruction set, see simd.h.
//
// Nothing of the forward pass is kept: states are computed again. A walk is cut into bands of chunks, whole lines in
// 2-D. A first pass over a walk of several bands keeps the states at the start of each; then, from the last band to the
// first, the band is scanned again with its states kept, and swept in reverse.
#pragma once

#include "scan_steps.h"
#include "scan_sums.h"

namespace vssm {
namespace {

// ---- bands ----------------------------------------------------------------------------------------------------------

// A chunk: `length` positions of line i from position j on, the first of which is the number `position` in the order in
// which the walk's chunks follow one another; and where the states of its line are, and those of the line before.
struct Span {
  int64_t i, j, length, position, carry, row;
};

// In 2-D a band is a few whole lines, and the states of its last line enter the next one. Where lines are long and few
// it is a strip of all lines, and the states at which they stop enter the next one.
struct Bands {
  int64_t outer, inner, chunks_per_line, chunks, chunks_per_band, count;
  bool strips = false;
  int64_t width;      // of a strip, else of a line, in chunks
  int64_t positions;  // of the longest band
  int64_t carries;    // states at the previous position that are alive at once: one, or one a line
  int64_t row;        // and on the previous line
  int64_t kept;       // those that enter a band

  template <class T>
  Bands(const ScanArgs<T>& s, const Walk& walk) : outer(walk.outer), inner(walk.inner) {
    constexpr int64_t kBuffers = 8, kCacheBytes = 896 << 10, kPositions = 512;
    const int64_t total = outer * inner, longest = at_most(inner, kChunk);
    chunks_per_line = width = (inner + kChunk - 1) / kChunk;
    chunks = outer * chunks_per_line;
    carries = 1, row = s.ndim == 2 ? inner : 0;
    if (total * s.lanes * kBuffers * int64_t(sizeof(T)) <= kCacheBytes) {
      chunks_per_band = chunks;
      positions = total;
    } else if (s.ndim == 1) {
      chunks_per_band = (kPositions + longest - 1) / longest;
      positions = chunks_per_band * longest;
    } else {
      // On a giant map the states that are kept outgrow the band: sqrt(length / kBuffers) lines, or positions of each
      // line, balance the two.
      const auto balanced = [](int64_t least, int64_t step, int64_t length) {
        while (least * least * kBuffers < length) least += step;
        return least;
      };
      const int64_t lines = balanced(at_most(outer, (kPositions + inner - 1) / inner), 1, outer);
      const int64_t wide = (kPositions / outer + kChunk - 1) / kChunk * kChunk;
      const int64_t columns = balanced(wide ? wide : kChunk, kChunk, inner);
      const auto needed = [&](int64_t size, int64_t entering, int64_t bands) {
        return kBuffers * size + s.states * entering * bands;
      };
      strips = needed(columns * outer, outer, inner / columns) < needed(lines * inner, inner, outer / lines);
      if (strips) {
        width = columns / kChunk;
        chunks_per_band = outer * width;
        positions = outer * columns;
        carries = outer, row = columns;
      } else {
        chunks_per_band = lines * chunks_per_line;
        positions = lines * inner;
      }
    }
    count = (chunks + chunks_per_band - 1) / chunks_per_band;
    kept = s.states * (s.ndim == 2 && !strips ? inner : carries);
  }

  VSSM_INLINE int64_t first_chunk(int64_t band) const { return at_most(band * chunks_per_band, chunks); }

  VSSM_INLINE Span span(int64_t chunk) const {
    const int64_t first = chunk / (outer * width) * width;  // of the strip's chunks in each line
    const int64_t here = at_most(width, chunks_per_line - first), within = chunk - first * outer;
    const int64_t i = within / here, column = within % here * kChunk, begin = first * kChunk, j = begin + column;
    const int64_t columns = at_most(width * kChunk, inner - begin);
    return {i, j, at_most(kChunk, inner - j), begin * outer + i * columns + column, strips ? i : 0, column};
  }
};

// Buffers with a row of `lanes` for every position of a band.
template <class T>
struct BandBuffers {
  T *x, *dy;             // as the tensors have them
  T *d, *slope;          // step sizes, and the derivative of softplus
  T* a;                  // decays of one state
  T *carries, *rows_in;  // its states at the previous position, and in 2-D on the previous line
  T *dbx, *drate;        // sums over the states: dg B and (da a) A

  VSSM_INLINE BandBuffers from(int64_t offset) const {
    return {x + offset,       dy + offset,      d + offset,   slope + offset, a + offset,
            carries + offset, rows_in + offset, dbx + offset, drate + offset};
  }
};

// What one task works in, laid out in its scratch.
template <class T>
struct BackwardScratch {
  BandBuffers<T> band;
  T *carry, *row;      // by state: the one at the previous position, and in 2-D those of the previous line, see Bands
  T* kept;             // states at the start of each band
  T *dB, *dC, *part;   // a chunk of positions each
  T* packed;           // the block's parameters
  T* dx;               // where x is in a half type, what its gradient is summed in before it is rounded
  int64_t size;

  BackwardScratch(const ScanArgs<T>& s, T* base) {
    // Walks along rows and along columns have bands of their own: room for the larger.
    int64_t positions = 0, carries = 0, rows = 0, kept_rows = 0;
    const auto make_room = [](int64_t& room, int64_t needed) { room = room < needed ? needed : room; };
    for (int64_t k = 0; k < s.num_orders; ++k) {
      const Bands bands(s, Walk(s, k));
      make_room(positions, bands.positions);
      make_room(carries, bands.carries);
      make_room(rows, bands.row);
      make_room(kept_rows, bands.kept * bands.count);
    }
    T* next = base;
    auto take = [&](int64_t number) {
      T* p = next;
      next += number * s.lanes;
      return p;
    };
    T** buffers[] = {&band.d,       &band.slope,   &band.x,   &band.dy,   &band.a,
                     &band.carries, &band.rows_in, &band.dbx, &band.drate};
    for (T** p : buffers) *p = take(positions + kTile);
    carry = take(s.states * carries);
    row = take(s.states * rows);
    kept = take(kept_rows);
    dB = take(kChunk);
    dC = take(kChunk);
    part = take(kChunk);
    dx = take(s.x.type != Type::kWhole && s.num_orders > 1 ? s.positions() : 0);
    packed = next;
    size = packed - base + s.num_orders * Block<T>::size_of_order(s, true);
  }
};

template <class T>
int64_t scan_backward_scratch(const ScanArgs<T>& s) {
  return BackwardScratch<T>(s, nullptr).size;
}

// ---- recurrences ----------------------------------------------------------------------------------------------------

// What the recurrence of one state and its reverse read and write over a chunk; without a shape it is (length, lanes).
template <class T>
struct BackwardChunk {
  int64_t length;
  BandBuffers<T> band;  // from the chunk's first position on
  Rows<const T> B, C;   // one number a position
  const T* A;           // (lanes)
  T* carry;             // (lanes): forwards the state at the previous position, in reverse a[j+1] dg[j+1]; updated
  T* row;               // in 2-D: forwards the states of the previous line, in reverse a[i+1] dh[i+1]; updated
  T* dA;                // (lanes): da a d is added to it, summed over the positions
  T *dB, *dC;           // (length, vector): left to be summed over the vector
};

// Forwards, without output. Where `keep`, the incoming states are kept in `carries` and in 2-D in `rows_in`.
template <class T, int NV, int NDIM>
void rescan_chunk(const BackwardChunk<T>& chunk, bool keep) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const BackwardChunk<T> c = chunk;  // a copy, which no store can change: what it says may stay in registers
  V g[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) g[v] = load(c.carry + v * W);
  for (int64_t t = 0; t < c.length; ++t) {
    const T Bt = *c.B[t];
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V at = load(c.band.a + i);
      if (keep) store(c.band.carries + i, g[v]);
      g[v] = at * g[v] + load(c.band.d + i) * (load(c.band.x + i) * Bt);
      if (NDIM == 2) {
        const V above = load(c.row + i);
        if (keep) store(c.band.rows_in + i, above);
        store(c.row + i, at * above + g[v]);
      }
    }
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) store(c.carry + v * W, g[v]);
}

// In reverse. The first state sets dbx and drate, the others add to them. In a PARTIAL block, the lanes beyond the valid
// ones are left out of dB and dC.
template <class T, int NV, int NDIM, bool FIRST, bool PARTIAL>
void unscan_chunk(const BackwardChunk<T>& chunk, int64_t valid) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const BackwardChunk<T> c = chunk;
  V back[NV], A_sum[NV], rate[NV];
  Int<T> is_valid[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    for (int l = 0; l < W; ++l) is_valid[v][l] = -(v * W + l < valid);
    back[v] = load(c.carry + v * W);
    A_sum[v] = load(c.dA + v * W);
    rate[v] = load(c.A + v * W);
  }
  for (int64_t t = c.length - 1; t >= 0; --t) {
    const T Bt = *c.B[t], Ct = *c.C[t];
    V B_sum = {}, C_sum = {};
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V at = load(c.band.a + i), dt = load(c.band.d + i), dyt = load(c.band.dy + i), dx = dt * load(c.band.x + i);
      const V before = load(c.band.carries + i);
      V h = at * before + dx * Bt, dh = dyt * Ct;
      if (NDIM == 2) dh += load(c.row + i);
      const V dg = dh + back[v];
      V da = dg * before;
      if (NDIM == 2) {
        const V above = load(c.band.rows_in + i);
        h += at * above;
        da += dh * above;
        store(c.row + i, at * dh);
      }
      back[v] = at * dg;
      const V dexp = da * at;
      A_sum[v] += dexp * dt;
      if (PARTIAL) {
        B_sum += is_valid[v] ? dg * dx : V{};
        C_sum += is_valid[v] ? dyt * h : V{};
      } else {
        B_sum += dg * dx;
        C_sum += dyt * h;
      }
      store(c.band.dbx + i, FIRST ? dg * Bt : load(c.band.dbx + i) + dg * Bt);
      store(c.band.drate + i, FIRST ? dexp * rate[v] : load(c.band.drate + i) + dexp * rate[v]);
    }
    store(c.dB + t * W, B_sum);
    store(c.dC + t * W, C_sum);
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    store(c.carry + v * W, back[v]);
    store(c.dA + v * W, A_sum[v]);
  }
}

// Once dbx and drate are complete: the gradient of x, added to dx (length, lanes), which the first order sets; that of
// the steps before softplus, in place of drate; and those of the bias and of D, (lanes), summed over the positions and
// added.
template <class T, int NV>
void finish_chunk(const BandBuffers<T>& chunk, int64_t length, bool first, const T* D, T* dx, T* dbias, T* dD) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const BandBuffers<T> c = chunk;
  V bias_sum[NV], D_sum[NV], skip[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    bias_sum[v] = load(dbias + v * W);
    D_sum[v] = load(dD + v * W);
    skip[v] = load(D + v * W);
  }
  for (int64_t t = 0; t < length; ++t) {
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V xt = load(c.x + i), dyt = load(c.dy + i), dbx = load(c.dbx + i);
      store(dx + i, dbx * load(c.d + i) + (first ? skip[v] * dyt : load(dx + i)));
      const V raw = (load(c.drate + i) + dbx * xt) * load(c.slope + i);
      store(c.drate + i, raw);
      bias_sum[v] += raw;
      D_sum[v] += dyt * xt;
    }
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    store(dbias + v * W, bias_sum[v]);
    store(dD + v * W, D_sum[v]);
  }
}

// ---- walks ----------------------------------------------------------------------------------------------------------

// Where the sums of one image, block of channels and order go.
template <class T>
struct BackwardSums {
  T* params;      // (N + 2 + R, lanes), as ScanGrads has them; added to
  int64_t group;  // the part of what sums over channels
  bool add;       // whether another block of the group has written that part
};

// One image, block of channels and order. The gradient of x is set by the first order and added to by the others, which
// follow it at once.
template <class T, int NV, int NDIM>
class BackwardWalk {
 public:
  BackwardWalk(const ScanArgs<T>& s, const ScanGrads<T>& grad, const BackwardScratch<T>& w, int64_t image,
               const Block<T>& block, int64_t k, const BackwardSums<T>& sums)
      : s(s), w(w), block(block), k(k), walk(s, k), bands(s, walk), A(block.A(k)), dA(sums.params),
        dbias(dA + s.states * L), dD(dbias + L), dweight(dD + L), grad(grad), add(sums.add) {
    x = walk.line<const char>(s.x, image, 0, block.channel * size_of<T>(s.x.type));
    dy = walk.line<const char>(grad.y, image, 0, block.channel * size_of<T>(grad.y.type));
    dt = walk.line(s.dt, image, k, s.rank ? 0 : block.channel);
    B = walk.line(s.B, image, k);
    C = walk.line(s.C, image, k);
    // A contiguous (batch, H, W, K, last) gradient along this walk.
    auto contiguous = [&](T* data, int64_t orders, int64_t last, int64_t offset) {
      const Map<T> map{data, s.height * s.width * orders * last, s.width * orders * last, orders * last, last};
      return walk.line(map, image, orders == 1 ? 0 : k, offset);
    };
    const int64_t N = s.states, R = s.rank, K = s.num_orders;
    const int64_t part = sums.group * s.batch * s.height * s.width * K;
    if (grad.x) {
      const int64_t bytes = size_of<T>(s.x.type), cell = s.channels * bytes;
      const Map<char> map{grad.x, s.positions() * cell, s.width * cell, cell, 0};
      dx = walk.line(map, image, 0, block.channel * bytes);
      dx_sums = s.x.type == Type::kWhole ? contiguous(reinterpret_cast<T*>(grad.x), 1, s.channels, block.channel)
                                         : walk.line(Map<T>{w.dx, 0, s.width * L, L, 0}, 0, 0);
    }
    if (grad.dt) ddt = R ? contiguous(grad.dt + part * R, K, R, 0) : contiguous(grad.dt, K, s.channels, block.channel);
    if (grad.B) dB = contiguous(grad.B + part * N, K, N, 0);
    if (grad.C) dC = contiguous(grad.C + part * N, K, N, 0);
  }

  void run() {
    keep_states();
    // From here on carry and row hold what flows back.
    clear_states();
    for (int64_t band = bands.count - 1; band >= 0; --band) {
      const int64_t begin = bands.first_chunk(band), end = bands.first_chunk(band + 1);
      base = bands.span(begin).position;
      for (int64_t chunk = begin; chunk < end; ++chunk) load_chunk(bands.span(chunk), true);
      const Span last = bands.span(end - 1);
      const int64_t length = last.position + last.length - base;
      const auto form_decays = decays_of(length);
      for (int64_t n = 0; n < s.states; ++n) {
        form_decays(A + n * L, w.band.d, length, w.band.a);
        rescan(begin, end, n, kept_at(band));
        unscan(begin, end, n);
      }
      for (int64_t chunk = begin; chunk < end; ++chunk) finish(bands.span(chunk));
    }
  }

 private:
  static constexpr int W = kWidth<T>, L = NV * W;

  static void zero(T* p, int64_t rows) { std::memset(p, 0, rows * L * sizeof(T)); }

  void clear_states() {
    zero(w.carry, s.states * bands.carries);
    if (NDIM == 2) zero(w.row, s.states * bands.row);
  }

  // The states that enter a band: by state one, in 2-D a line of them, or one of each line of a strip.
  T* kept_at(int64_t band) const { return w.kept + band * bands.kept * L; }
  void keep(int64_t band) {
    std::memcpy(kept_at(band), NDIM == 2 && !bands.strips ? w.row : w.carry, bands.kept * L * sizeof(T));
  }

  int64_t offset(const Span& at) const { return (at.position - base) * L; }

  // What every chunk reads into the buffers of the band, and where `all` what the reverse reads besides.
  void load_chunk(const Span& at, bool all) {
    const BandBuffers<T> to = w.band.from(offset(at));
    gather(to.x, L, x.at(at.i, at.j), s.x.type, x.inner, at.length, block.valid);
    if (all) gather(to.dy, L, dy.at(at.i, at.j), grad.y.type, dy.inner, at.length, block.valid);
    steps<T, NV>(s, block, k, dt.rows(at.i, at.j), at.length, to.d, all ? to.slope : nullptr);
  }

  // State n over a chunk, in reverse unless carry and row are set otherwise.
  VSSM_INLINE BackwardChunk<T> chunk_of(const Span& at, int64_t n) const {
    BackwardChunk<T> c;
    c.length = at.length;
    c.band = w.band.from(offset(at));
    c.B = B.rows(at.i, at.j), c.C = C.rows(at.i, at.j);
    c.B.data += n, c.C.data += n;
    c.A = A + n * L;
    c.carry = w.carry + (n * bands.carries + at.carry) * L, c.row = w.row + (n * bands.row + at.row) * L;
    c.dA = dA + n * L, c.dB = w.dB, c.dC = w.dC;
    return c;
  }

  // The first pass, up to the last band, chunk by chunk.
  void keep_states() {
    clear_states();
    for (int64_t band = 0; band < bands.count - 1; ++band) {
      keep(band);
      for (int64_t chunk = bands.first_chunk(band); chunk < bands.first_chunk(band + 1); ++chunk) {
        const Span at = bands.span(chunk);
        base = at.position;
        load_chunk(at, false);
        if (NDIM == 2 && !bands.strips && at.j == 0) zero(w.carry, s.states);
        if (bands.strips && at.i == 0 && at.row == 0) zero(w.row, s.states * bands.row);
        const auto form_decays = decays_of(at.length);
        for (int64_t n = 0; n < s.states; ++n) {
          form_decays(A + n * L, w.band.d, at.length, w.band.a);
          rescan_chunk<T, NV, NDIM>(chunk_of(at, n), false);
        }
      }
    }
    keep(bands.count - 1);
  }

  // The way to form decays from the first `length` steps of the band's buffer.
  auto decays_of(int64_t length) const {
    return out_of_reach<T, NV>(A, s.states, w.band.d, length) ? decays<T, NV, true> : decays<T, NV, false>;
  }

  // Scan the chunks [begin, end) of a band again for state n, keeping its states.
  void rescan(int64_t begin, int64_t end, int64_t n, T* kept) {
    T carry[L] = {};
    T* const row = w.row + n * bands.row * L;  // of a strip, which leaves nothing there to the next
    if (bands.strips) zero(row, bands.row);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const Span at = bands.span(chunk);
      if (NDIM == 2 && !bands.strips && at.j == 0) std::memset(carry, 0, sizeof carry);
      BackwardChunk<T> c = chunk_of(at, n);
      if (NDIM == 1 || bands.strips) c.carry = kept + (n * bands.carries + at.carry) * L;
      else c.carry = carry, c.row = kept + (n * bands.row + at.row) * L;
      rescan_chunk<T, NV, NDIM>(c, true);
    }
    if (bands.strips) zero(row, bands.row);
  }

  // Sweep them in reverse.
  void unscan(int64_t begin, int64_t end, int64_t n) {
    const bool first = n == 0, partial = block.valid < L;
    const auto unscan_state = partial && first ? unscan_chunk<T, NV, NDIM, true, true>
                              : partial        ? unscan_chunk<T, NV, NDIM, false, true>
                              : first          ? unscan_chunk<T, NV, NDIM, true, false>
                                               : unscan_chunk<T, NV, NDIM, false, false>;
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      const Span at = bands.span(chunk);
      if (NDIM == 2 && !bands.strips && at.j + at.length == walk.inner) zero(w.carry + n * L, 1);
      unscan_state(chunk_of(at, n), block.valid);
      if (grad.B) sum_vectors(dB.rows(at.i, at.j, n), add, w.dB, at.length);
      if (grad.C) sum_vectors(dC.rows(at.i, at.j, n), add, w.dC, at.length);
    }
  }

  // The gradients of x and of the steps with what they are made of, once the sums over the states are complete.
  void finish(const Span& at) {
    const BandBuffers<T> band = w.band.from(offset(at));
    const T* draw = band.drate;
    const bool sets_x = k == 0 || !grad.x, half = s.x.type != Type::kWhole;
    const int64_t sums_valid = half ? L : block.valid;
    if (!sets_x) gather(w.part, L, dx_sums.at(at.i, at.j), dx_sums.inner, at.length, sums_valid);
    finish_chunk<T, NV>(band, at.length, sets_x, block.D(0), w.part, dbias, dD);
    if (grad.x && half && k < s.num_orders - 1)
      scatter(dx_sums.at(at.i, at.j), dx_sums.inner, w.part, L, L, at.length, L);
    else if (grad.x)
      scatter(dx.at(at.i, at.j), s.x.type, dx.inner, w.part, L, L, at.length, block.valid);
    if (grad.weight) weight_gradient<T, NV>(dweight, draw, dt.rows(at.i, at.j), at.length, s.rank);
    if (grad.dt && s.rank) {
      step_gradient<T, L>(ddt.rows(at.i, at.j), add, draw, at.length, block.valid, block.weight_t(k), s.rank,
                          block.rank_padded(s));
    } else if (grad.dt) {
      scatter(ddt.at(at.i, at.j), ddt.inner, draw, L, L, at.length, block.valid);
    }
  }

  const ScanArgs<T>& s;
  const BackwardScratch<T>& w;
  const Block<T>& block;
  const int64_t k;
  const Walk walk;
  const Bands bands;
  const T* const A;
  T *const dA, *const dbias, *const dD, *const dweight;
  const ScanGrads<T>& grad;
  const bool add;
  Line<const char> x, dy;
  Line<const T> dt, B, C;
  Line<char> dx;                     // this and what follows of what is wanted
  Line<T> dx_sums, ddt, dB, dC;
  int64_t base = 0;  // the position with which the band's buffers begin
};

template <class T, int NV, int NDIM>
void backward_walk(const ScanArgs<T>& s, const ScanGrads<T>& grad, const BackwardScratch<T>& w, int64_t image,
                   const Block<T>& block, int64_t k, const BackwardSums<T>& sums) {
  BackwardWalk<T, NV, NDIM>(s, grad, w, image, block, k, sums).run();
}

template <class T, int NV>
void backward_tasks(const ScanArgs<T>& s, const ScanGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  const BackwardScratch<T> w(s, scratch);
  const int64_t blocks = s.num_blocks(), size = grad.params_size(s);
  const auto walk = s.ndim == 1 ? backward_walk<T, NV, 1> : backward_walk<T, NV, 2>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t images = task / grad.channel_groups, group = task % grad.channel_groups;
    const int64_t first = group * blocks / grad.channel_groups, last = (group + 1) * blocks / grad.channel_groups;
    const int64_t first_image = images * s.batch / grad.image_groups;
    const int64_t last_image = (images + 1) * s.batch / grad.image_groups;
    for (int64_t index = first; index < last; ++index) {
      const Block<T> block(s, index, true, w.packed);
      T* const params = grad.params + (images * blocks + index) * s.num_orders * size;
      std::memset(params, 0, s.num_orders * size * sizeof(T));
      for (int64_t image = first_image; image < last_image; ++image)
        for (int64_t k = 0; k < s.num_orders; ++k)
          walk(s, grad, w, image, block, k, {params + k * size, group, index > first});
    }
  }
}

template <class T>
void scan_backward(const ScanArgs<T>& s, const ScanGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  (s.lanes == kWidth<T> ? backward_tasks<T, 1> : backward_tasks<T, 2>)(s, grad, scratch, begin, end);
}

}  // namespace
}  // namespace vssm
