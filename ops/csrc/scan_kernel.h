// SPDX-License-Identifier: Apache-2.0
// The selective scan for one instruction set, see simd.h.
//
// One task walks a block of `lanes` channels of one image in every order. A line of the walk is cut into chunks of kChunk
// positions, small enough for the first-level cache. Within a chunk what has no recurrence comes first (step sizes and
// decays, many positions at once), then the recurrence alone.
#pragma once

#include "functions.h"
#include "scan.h"

namespace vssm {
namespace {

constexpr int64_t kChunk = 64;
// Positions whose steps are formed together: with two vectors of channels each they fill half of the registers.
constexpr int kTile = VSSM_VECTOR_BYTES == 64 ? 8 : 4;

// ---- walks -----------------------------------------------------------------------------------------------------------

// One tensor along one walk: the address of (outer i, inner j) and the step from one inner position to the next.
template <class T>
struct Line {
  T* origin;
  int64_t outer, inner;
  T* at(int64_t i, int64_t j) const { return origin + i * outer + j * inner; }
};

// The extent of a walk. A map of one column is walked as one row, so that chunks are long.
struct Walk {
  int64_t outer, inner;
  bool transposed, reversed;

  // Along the order's own lines, or, where `raster`, always along the rows.
  template <class T>
  Walk(const ScanArgs<T>& s, int64_t k, bool raster = false) {
    transposed = !raster && s.orders[k] % 2;
    reversed = s.orders[k] >= 2;
    if ((transposed ? s.height : s.width) == 1) transposed = !transposed;
    outer = transposed ? s.width : s.height;
    inner = transposed ? s.height : s.width;
  }

  template <class T>
  Line<T> line(const Map<T>& map, int64_t image, int64_t k, int64_t offset = 0) const {
    Line<T> l{map.data + image * map.batch + k * map.order + offset, map.row, map.column};
    if (transposed) l = {l.origin, map.column, map.row};
    if (reversed) l = {l.at(outer - 1, inner - 1), -l.outer, -l.inner};
    return l;
  }
};

// ---- what has no recurrence --------------------------------------------------------------------------------------------

// Step sizes of `length` positions: d (length, lanes), and the derivative of softplus where `derivative` is given. Both are
// written for `length` rounded up to kTile, the last position repeated: the buffers have room for that.
template <class T, int NV>
void steps(const ScanArgs<T>& s, int64_t block, int64_t k, const T* dt, int64_t step, int64_t length, int64_t valid, T* d,
           T* derivative) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const T* weight = s.weight(block, k);
  const T* bias = s.bias(block, k);
  const int64_t rank = s.rank;
  for (int64_t t0 = 0; t0 < length; t0 += kTile) {
    const T* low[kTile];
    VSSM_UNROLL
    for (int p = 0; p < kTile; ++p) low[p] = dt + at_most(t0 + p, length - 1) * step;
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
        gather(row, L, low[p], 0, 1, valid);
        VSSM_UNROLL
        for (int v = 0; v < NV; ++v) raw[p * NV + v] += load(row + v * W);
      }
    }
    VSSM_UNROLL
    for (int m = 0; m < kTile * NV; ++m) store(d + t0 * L + m * W, raw[m]);
  }
  const int64_t end = (length + kTile - 1) / kTile * kTile * L;
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

// a = exp(d A), for `length` positions rounded up to kTile: the buffers have room for that.
template <class T, int NV>
void decays(const T* A, const T* d, int64_t length, T* a) {
  constexpr int W = kWidth<T>, L = NV * W;
  Vec<T> rate[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) rate[v] = load(A + v * W);
  const int64_t end = (length + kTile - 1) / kTile * kTile * L;
  for (int64_t i = 0; i < end; i += kGroup * W) {
    Vec<T> x[kGroup];
    VSSM_UNROLL
    for (int m = 0; m < kGroup; ++m) x[m] = load(d + i + m * W) * rate[m % NV];
    exp_(x);
    VSSM_UNROLL
    for (int m = 0; m < kGroup; ++m) store(a + i + m * W, x[m]);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------------

// What runs along a line of the walk and what from one line to the next. A 2-D order goes along the rows in either form, for
// its two recurrences may change places: nothing strides through memory, and orders of one direction share a pass.
enum class Form { k1d, k2dRows, k2dColumns };

// The recurrence of one state over a chunk. `carry` (lanes) comes from the previous position of the line, `row` (length,
// lanes) from the previous line, both updated. The states C h are added up in y (length, lanes): set where `first`, and with
// D x or y's present value where `last`.
template <class T, int NV, Form FORM>
void scan_chunk(int64_t length, const T* x, int64_t x_step, const T* d, const T* a, const T* B, int64_t B_step, const T* C,
                int64_t C_step, T* carry, T* row, bool first, bool last, const T* D, T* partial, T* y, int64_t y_step) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  V along[NV], skip[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    along[v] = load(carry + v * W);
    skip[v] = D ? load(D + v * W) : V{};
  }
  for (int64_t t = 0; t < length; ++t) {
    const T Bt = B[t * B_step], Ct = C[t * C_step];
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V at = load(a + i), xt = load(x + t * x_step + v * W);
      V h = load(d + i) * (xt * Bt);
      if (FORM == Form::k2dColumns) {
        h += at * load(row + i);
        store(row + i, h);
      }
      h += at * along[v];
      along[v] = h;
      if (FORM == Form::k2dRows) {
        h += at * load(row + i);
        store(row + i, h);
      }
      V out = h * Ct;
      if (!first) out += load(partial + i);
      if (!last) {
        store(partial + i, out);
      } else {
        T* yt = y + t * y_step + v * W;
        store(yt, out + (D ? skip[v] * xt : load(yt)));
      }
    }
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) store(carry + v * W, along[v]);
}

template <class T>
int64_t longest_line(const ScanArgs<T>& s) {
  return s.height > s.width ? s.height : s.width;
}

template <class T>
int64_t scan_forward_scratch(const ScanArgs<T>& s) {
  const int64_t rows = s.ndim == 2 ? longest_line(s) : 0;
  return 5 * kChunk * s.lanes + s.num_orders * s.states * (1 + rows) * s.lanes;
}

template <class T, int NV, int NDIM>
void forward_block(const ScanArgs<T>& s, T* y, T* scratch, int64_t image, int64_t block) {
  constexpr int64_t L = NV * kWidth<T>, chunk = kChunk * L;
  T *d = scratch, *a = d + chunk, *partial = a + chunk, *x_part = partial + chunk, *y_part = x_part + chunk;
  T* const carries = y_part + chunk;
  T* const rows = carries + s.num_orders * s.states * L;
  const int64_t channel = block * L, valid = at_most(L, s.channels - channel);
  const Map<T> y_map{y, s.height * s.width * s.channels, s.width * s.channels, s.channels, 0};

  for (int64_t begin = 0, end; begin < s.num_orders; begin = end) {
    // The orders of one pass, and what each of them walks along.
    const Walk walk(s, begin, NDIM == 2);
    end = begin + 1;
    while (NDIM == 2 && end < s.num_orders && Walk(s, end, true).reversed == walk.reversed) ++end;
    const int64_t states = (end - begin) * s.states, row_size = walk.inner * L;
    const auto x = walk.line(s.x, image, 0, channel);
    const auto y = walk.line(y_map, image, 0, channel);
    std::memset(carries, 0, states * L * sizeof(T));
    if (NDIM == 2) std::memset(rows, 0, states * row_size * sizeof(T));

    for (int64_t i = 0; i < walk.outer; ++i) {
      if (NDIM == 2 && i > 0) std::memset(carries, 0, states * L * sizeof(T));
      for (int64_t j = 0; j < walk.inner; j += kChunk) {
        const int64_t length = at_most(kChunk, walk.inner - j);
        const T* xc = x.at(i, j);
        T* yc = y.at(i, j);
        int64_t x_step = x.inner, y_step = y.inner;
        if (valid < L) {
          gather(x_part, L, xc, x_step, length, valid);
          if (begin > 0) gather(y_part, L, yc, y_step, length, valid);
          xc = x_part, yc = y_part, x_step = y_step = L;
        }
        T *carry = carries, *row = rows + j * L;
        for (int64_t k = begin; k < end; ++k) {
          const auto dt = walk.line(s.dt, image, k, s.rank ? 0 : channel);
          const auto B = walk.line(s.B, image, k), C = walk.line(s.C, image, k);
          const auto scan = NDIM == 1              ? scan_chunk<T, NV, Form::k1d>
                            : s.orders[k] % 2 == 0 ? scan_chunk<T, NV, Form::k2dRows>
                                                   : scan_chunk<T, NV, Form::k2dColumns>;
          steps<T, NV>(s, block, k, dt.at(i, j), dt.inner, length, valid, d, nullptr);
          for (int64_t n = 0; n < s.states; ++n, carry += L, row += row_size) {
            decays<T, NV>(s.A(block, k) + n * L, d, length, a);
            scan(length, xc, x_step, d, a, B.at(i, j) + n, B.inner, C.at(i, j) + n, C.inner, carry, row, n == 0,
                 n == s.states - 1, k == 0 ? s.D(block, 0) : nullptr, partial, yc, y_step);
          }
        }
        if (valid < L) scatter(y.at(i, j), y.inner, y_part, L, length, valid);
      }
    }
  }
}

template <class T, int NV>
void forward_tasks(const ScanArgs<T>& s, T* y, T* scratch, int64_t begin, int64_t end) {
  const int64_t blocks = s.num_blocks();
  for (int64_t task = begin; task < end; ++task)
    (s.ndim == 1 ? forward_block<T, NV, 1> : forward_block<T, NV, 2>)(s, y, scratch, task / blocks, task % blocks);
}

template <class T>
void scan_forward(const ScanArgs<T>& s, T* y, T* scratch, int64_t begin, int64_t end) {
  (s.lanes == kWidth<T> ? forward_tasks<T, 1> : forward_tasks<T, 2>)(s, y, scratch, begin, end);
}

// ---- backward ----------------------------------------------------------------------------------------------------------
// Nothing of the forward is kept: states are recomputed. A walk is cut into bands of chunks, whole lines in 2-D. A first
// pass over a walk of several bands keeps the states at the start of each; then, from the last band to the first, the band
// is redone with its states kept and swept in reverse.

struct Bands {
  int64_t inner, chunks_per_line, chunks, chunks_per_band, positions, count;  // positions: of the longest band
  int64_t kept;                                                              // rows of `lanes` kept for a band

  template <class T>
  Bands(const ScanArgs<T>& s, int64_t outer, int64_t inner) : inner(inner) {
    constexpr int64_t kBuffers = 8, kCacheBytes = 896 << 10, kPositions = 512;
    const int64_t total = outer * inner, longest = at_most(inner, kChunk);
    chunks_per_line = (inner + kChunk - 1) / kChunk;
    chunks = outer * chunks_per_line;
    if (total * s.lanes * kBuffers * int64_t(sizeof(T)) <= kCacheBytes) {
      chunks_per_band = chunks;
      positions = total;
    } else if (s.ndim == 1) {
      chunks_per_band = (kPositions + longest - 1) / longest;
      positions = chunks_per_band * longest;
    } else {
      // On a giant map the states that are kept outgrow the band: sqrt(outer / kBuffers) lines balance the two.
      int64_t lines = at_most(outer, (kPositions + inner - 1) / inner);
      while (lines * lines * kBuffers < outer) ++lines;
      chunks_per_band = lines * chunks_per_line;
      positions = lines * inner;
    }
    count = (chunks + chunks_per_band - 1) / chunks_per_band;
    kept = s.states * (s.ndim == 2 ? inner : 1);
  }

  int64_t line_of(int64_t chunk) const { return chunk / chunks_per_line; }
  int64_t inner_of(int64_t chunk) const { return chunk % chunks_per_line * kChunk; }
  int64_t length_of(int64_t chunk) const { return at_most(kChunk, inner - inner_of(chunk)); }
  int64_t position_of(int64_t chunk) const { return line_of(chunk) * inner + inner_of(chunk); }
  int64_t first(int64_t band) const { return at_most(band * chunks_per_band, chunks); }
};

// The recurrence of one state over a chunk, without output. Where `carries` is given, the states that come in along the
// inner axis, and in 2-D along the outer one, are kept there and in `rows_in`, (length, lanes) each.
template <class T, int NV, int NDIM>
void rescan_chunk(int64_t length, const T* x, const T* d, const T* a, const T* B, int64_t B_step, T* carry, T* row,
                  T* carries, T* rows_in) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  V g[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) g[v] = load(carry + v * W);
  for (int64_t t = 0; t < length; ++t) {
    const T Bt = B[t * B_step];
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V at = load(a + i);
      if (carries) store(carries + i, g[v]);
      g[v] = at * g[v] + load(d + i) * (load(x + i) * Bt);
      if (NDIM == 2) {
        const V above = load(row + i);
        if (carries) store(rows_in + i, above);
        store(row + i, at * above + g[v]);
      }
    }
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) store(carry + v * W, g[v]);
}

// The reverse of one state's recurrence over a chunk. `carry` (lanes) is a[j+1] dg[j+1], `row` (length, lanes) is
// a[i+1] dh[i+1], both updated. Added up over the states: dg B in dbx and (da a) A in drate, (length, lanes) each, set
// where `first`; over the positions: da a d in dA (lanes). `dB` and `dC` (length, vector) are left to be summed over the
// vector.
template <class T, int NV, int NDIM>
void unscan_chunk(int64_t length, const T* x, const T* dy, const T* d, const T* a, const T* carries, const T* rows_in,
                  const T* B, int64_t B_step, const T* C, int64_t C_step, const T* A, bool first, T* carry, T* row, T* dbx,
                  T* drate, T* dA, T* dB, T* dC) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  V back[NV], A_sum[NV], rate[NV];
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    back[v] = load(carry + v * W);
    A_sum[v] = load(dA + v * W);
    rate[v] = load(A + v * W);
  }
  for (int64_t t = length - 1; t >= 0; --t) {
    const T Bt = B[t * B_step], Ct = C[t * C_step];
    V B_sum = {}, C_sum = {};
    VSSM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = t * L + v * W;
      const V at = load(a + i), dt = load(d + i), dyt = load(dy + i), dx = dt * load(x + i);
      const V before = load(carries + i);
      V h = at * before + dx * Bt, dh = dyt * Ct;
      if (NDIM == 2) dh += load(row + i);
      const V dg = dh + back[v];
      V da = dg * before;
      if (NDIM == 2) {
        const V above = load(rows_in + i);
        h += at * above;
        da += dh * above;
        store(row + i, at * dh);
      }
      back[v] = at * dg;
      const V dexp = da * at;
      A_sum[v] += dexp * dt;
      B_sum += dg * dx;
      C_sum += dyt * h;
      store(dbx + i, first ? dg * Bt : load(dbx + i) + dg * Bt);
      store(drate + i, first ? dexp * rate[v] : load(drate + i) + dexp * rate[v]);
    }
    store(dB + t * W, B_sum);
    store(dC + t * W, C_sum);
  }
  VSSM_UNROLL
  for (int v = 0; v < NV; ++v) {
    store(carry + v * W, back[v]);
    store(dA + v * W, A_sum[v]);
  }
}

// to[t] = or += the sum of vector t.
template <class T>
void sum_vectors(T* to, int64_t step, bool add, const T* vectors, int64_t length) {
  constexpr int W = kWidth<T>;
  for (int64_t t = 0; t < length; ++t, vectors += W, to += step) {
    T part[W];
    std::memcpy(part, vectors, sizeof part);
    VSSM_UNROLL
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    *to = add ? *to + part[0] : part[0];
  }
}

// Gradient of the low-rank step, to[t, r] = or += sum over lanes of draw[t, lane] weight_t[lane, r].
template <class T, int L>
void step_gradient(T* to, int64_t step, bool add, const T* draw, int64_t length, const T* weight_t, int64_t rank,
                   int64_t rank_padded) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>;
  for (int64_t t0 = 0; t0 < length; t0 += kTile) {
    const T* row[kTile];
    VSSM_UNROLL
    for (int p = 0; p < kTile; ++p) row[p] = draw + at_most(t0 + p, length - 1) * L;
    for (int64_t r0 = 0; r0 < rank; r0 += W) {
      V sum[kTile] = {};
      for (int l = 0; l < L; ++l) {
        const V w = load(weight_t + l * rank_padded + r0);
        VSSM_UNROLL
        for (int p = 0; p < kTile; ++p) sum[p] += w * row[p][l];
      }
      const int64_t ranks = at_most(W, rank - r0), positions = at_most(kTile, length - t0);
      for (int64_t p = 0; p < positions; ++p) {
        T part[W];
        store(part, sum[p]);
        T* out = to + (t0 + p) * step + r0;
        for (int64_t r = 0; r < ranks; ++r) out[r] = add ? out[r] + part[r] : part[r];
      }
    }
  }
}

// Gradient of the step weight, to[r, lane] += sum over positions of low[t, r] draw[t, lane].
template <class T, int NV>
void weight_gradient(T* to, const T* draw, const T* low, int64_t step, int64_t length, int64_t rank) {
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
        for (int q = 0; q < kRanks; ++q) sum[q * NV + v] += dr * low[t * step + r[q]];
      }
    }
    for (int q = 0; q < at_most(kRanks, rank - r0); ++q)
      for (int v = 0; v < NV; ++v) {
        T* out = to + (r0 + q) * L + v * W;
        store(out, load(out) + sum[q * NV + v]);
      }
  }
}

// What one task works in, laid out in its scratch.
template <class T>
struct BackwardScratch {
  T *d, *slope, *x, *dy, *a, *carries, *rows_in, *dbx, *drate;  // a band of positions each
  T *carry, *row;                                               // states (N), and (N, inner) in 2-D
  T *kept;                                                      // states at the start of each band
  T *dB, *dC, *part;                                            // a chunk of positions each
  int64_t size;

  BackwardScratch(const ScanArgs<T>& s, T* base) {
    // Walks along rows and along columns have bands of their own: room for the larger.
    int64_t positions = 0, kept_rows = 0;
    for (int64_t k = 0; k < s.num_orders; ++k) {
      const Walk walk(s, k);
      const Bands bands(s, walk.outer, walk.inner);
      if (bands.positions > positions) positions = bands.positions;
      if (bands.kept * bands.count > kept_rows) kept_rows = bands.kept * bands.count;
    }
    T* next = base;
    auto take = [&](int64_t rows) {
      T* p = next;
      next += rows * s.lanes;
      return p;
    };
    T** band[] = {&d, &slope, &x, &dy, &a, &carries, &rows_in, &dbx, &drate};
    for (T** p : band) *p = take(positions + kTile);
    carry = take(s.states);
    row = take(s.ndim == 2 ? s.states * longest_line(s) : 0);
    kept = take(kept_rows);
    dB = take(kChunk);
    dC = take(kChunk);
    part = take(kChunk);
    size = next - base;
  }
};

template <class T>
int64_t scan_backward_scratch(const ScanArgs<T>& s) {
  return BackwardScratch<T>(s, nullptr).size;
}

// One image, block of channels and order. `params` (N + 2 + R, lanes) and grad.x are added to, the latter set where k = 0;
// what sums over channels is added to where `add`.
template <class T, int NV, int NDIM>
void backward_walk(const ScanArgs<T>& s, const ScanGrads<T>& grad, const BackwardScratch<T>& w, int64_t image, int64_t block,
                   int64_t k, int64_t group, bool add, T* params) {
  typedef Vec<T> V;
  constexpr int W = kWidth<T>, L = NV * W;
  const int64_t N = s.states, R = s.rank, K = s.num_orders, cells = s.height * s.width;
  const int64_t channel = block * L, valid = at_most(L, s.channels - channel);
  const Walk walk(s, k);
  const Bands bands(s, walk.outer, walk.inner);
  const T *A = s.A(block, k), *D = s.D(block, 0);
  T *dA = params, *dbias = dA + N * L, *dD = dbias + L, *dweight = dD + L;

  const auto x = walk.line(s.x, image, 0, channel), dy = walk.line(grad.y, image, 0, channel);
  const auto dt = walk.line(s.dt, image, k, R ? 0 : channel);
  const auto B = walk.line(s.B, image, k), C = walk.line(s.C, image, k);
  // A contiguous (batch, H, W, K, last) gradient along this walk.
  auto contiguous = [&](T* data, int64_t orders, int64_t last, int64_t offset) {
    return walk.line(Map<T>{data, cells * orders * last, s.width * orders * last, orders * last, last}, image,
                     orders == 1 ? 0 : k, offset);
  };
  const int64_t part = group * s.batch * cells * K;
  const auto dx = contiguous(grad.x, 1, s.channels, channel);
  const auto ddt = R ? contiguous(grad.dt + part * R, K, R, 0) : contiguous(grad.dt, K, s.channels, channel);
  const auto dB = contiguous(grad.B + part * N, K, N, 0);
  const auto dC = grad.C ? contiguous(grad.C + part * N, K, N, 0) : dB;

  auto zero = [](T* p, int64_t rows) { std::memset(p, 0, rows * L * sizeof(T)); };
  auto load_band = [&](int64_t begin, int64_t end, bool all) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = bands.line_of(c), j = bands.inner_of(c), length = bands.length_of(c);
      const int64_t offset = (bands.position_of(c) - bands.position_of(begin)) * L;
      gather(w.x + offset, L, x.at(i, j), x.inner, length, valid);
      if (all) gather(w.dy + offset, L, dy.at(i, j), dy.inner, length, valid);
      steps<T, NV>(s, block, k, dt.at(i, j), dt.inner, length, valid, w.d + offset, all ? w.slope + offset : nullptr);
    }
  };

  zero(w.carry, N);
  if (NDIM == 2) zero(w.row, N * walk.inner);
  if (bands.count > 1) {
    for (int64_t band = 0; band < bands.count - 1; ++band) {
      const int64_t begin = bands.first(band), end = bands.first(band + 1);
      std::memcpy(w.kept + band * bands.kept * L, NDIM == 2 ? w.row : w.carry, bands.kept * L * sizeof(T));
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = bands.line_of(c), j = bands.inner_of(c);
        load_band(c, c + 1, false);
        if (NDIM == 2 && j == 0) zero(w.carry, N);
        for (int64_t n = 0; n < N; ++n) {
          decays<T, NV>(A + n * L, w.d, bands.length_of(c), w.a);
          rescan_chunk<T, NV, NDIM>(bands.length_of(c), w.x, w.d, w.a, B.at(i, j) + n, B.inner, w.carry + n * L,
                                    w.row + (n * walk.inner + j) * L, nullptr, nullptr);
        }
      }
    }
  }
  std::memcpy(w.kept + (bands.count - 1) * bands.kept * L, NDIM == 2 ? w.row : w.carry, bands.kept * L * sizeof(T));

  // From here on carry and row hold what flows back.
  zero(w.carry, N);
  if (NDIM == 2) zero(w.row, N * walk.inner);
  for (int64_t band = bands.count - 1; band >= 0; --band) {
    const int64_t begin = bands.first(band), end = bands.first(band + 1);
    const int64_t base = bands.position_of(begin);
    const int64_t positions = bands.position_of(end - 1) + bands.length_of(end - 1) - base;
    T* kept = w.kept + band * bands.kept * L;
    load_band(begin, end, true);

    for (int64_t n = 0; n < N; ++n) {
      decays<T, NV>(A + n * L, w.d, positions, w.a);
      T carry[L] = {};
      if (NDIM == 1) std::memcpy(carry, kept + n * L, sizeof carry);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = bands.line_of(c), j = bands.inner_of(c), offset = (bands.position_of(c) - base) * L;
        if (NDIM == 2 && j == 0) std::memset(carry, 0, sizeof carry);
        rescan_chunk<T, NV, NDIM>(bands.length_of(c), w.x + offset, w.d + offset, w.a + offset, B.at(i, j) + n, B.inner, carry,
                                  kept + (n * walk.inner + j) * L, w.carries + offset, w.rows_in + offset);
      }
      for (int64_t c = end - 1; c >= begin; --c) {
        const int64_t i = bands.line_of(c), j = bands.inner_of(c), offset = (bands.position_of(c) - base) * L;
        const int64_t length = bands.length_of(c);
        if (NDIM == 2 && j + length == walk.inner) zero(w.carry + n * L, 1);
        unscan_chunk<T, NV, NDIM>(length, w.x + offset, w.dy + offset, w.d + offset, w.a + offset, w.carries + offset,
                                  w.rows_in + offset, B.at(i, j) + n, B.inner, C.at(i, j) + n, C.inner, A + n * L, n == 0,
                                  w.carry + n * L, w.row + (n * walk.inner + j) * L, w.dbx + offset, w.drate + offset,
                                  dA + n * L, w.dB, w.dC);
        sum_vectors(dB.at(i, j) + n, dB.inner, add, w.dB, length);
        if (grad.C) sum_vectors(dC.at(i, j) + n, dC.inner, add, w.dC, length);
      }
    }

    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = bands.line_of(c), j = bands.inner_of(c), offset = (bands.position_of(c) - base) * L;
      const int64_t length = bands.length_of(c);
      T* draw = w.drate + offset;
      if (k > 0) gather(w.part, L, dx.at(i, j), dx.inner, length, valid);
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
          const int64_t at = t * L + v * W, in_band = offset + at;
          const V xt = load(w.x + in_band), dyt = load(w.dy + in_band), dbx = load(w.dbx + in_band);
          store(w.part + at, dbx * load(w.d + in_band) + (k == 0 ? skip[v] * dyt : load(w.part + at)));
          const V raw = (load(draw + at) + dbx * xt) * load(w.slope + in_band);
          store(draw + at, raw);
          bias_sum[v] += raw;
          D_sum[v] += dyt * xt;
        }
      }
      scatter(dx.at(i, j), dx.inner, w.part, L, length, valid);
      VSSM_UNROLL
      for (int v = 0; v < NV; ++v) {
        store(dbias + v * W, bias_sum[v]);
        store(dD + v * W, D_sum[v]);
      }
      if (R) {
        weight_gradient<T, NV>(dweight, draw, dt.at(i, j), dt.inner, length, R);
        step_gradient<T, L>(ddt.at(i, j), ddt.inner, add, draw, length, s.weight_t(block, k), R, s.rank_padded());
      } else {
        scatter(ddt.at(i, j), ddt.inner, draw, L, length, valid);
      }
    }
  }
}

template <class T, int NV>
void backward_tasks(const ScanArgs<T>& s, const ScanGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  const BackwardScratch<T> w(s, scratch);
  const int64_t blocks = s.num_blocks(), size = grad.params_size(s);
  const auto walk = s.ndim == 1 ? backward_walk<T, NV, 1> : backward_walk<T, NV, 2>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t images = task / grad.channel_groups, group = task % grad.channel_groups;
    const int64_t first = group * blocks / grad.channel_groups, last = (group + 1) * blocks / grad.channel_groups;
    for (int64_t block = first; block < last; ++block)
      for (int64_t k = 0; k < s.num_orders; ++k) {
        T* params = grad.params + ((images * blocks + block) * s.num_orders + k) * size;
        std::memset(params, 0, size * sizeof(T));
        for (int64_t image = images * s.batch / grad.image_groups; image < (images + 1) * s.batch / grad.image_groups; ++image)
          walk(s, grad, w, image, block, k, group, block > first, params);
      }
  }
}

template <class T>
void scan_backward(const ScanArgs<T>& s, const ScanGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  (s.lanes == kWidth<T> ? backward_tasks<T, 1> : backward_tasks<T, 2>)(s, grad, scratch, begin, end);
}

// ------------------------------------------------------------------------------------------------------------------------

// Two vectors of channels a block; or one where the channels fill no more or leave half of the last block empty, or where
// so few blocks would leave a thread idle.
template <class T>
int64_t scan_lanes(int64_t images, int64_t channels) {
  constexpr int W = kWidth<T>;
  const int64_t last = channels % (2 * W), blocks = (channels + 2 * W - 1) / (2 * W);
  const bool half_empty = last && last <= W && channels < 8 * W;
  return half_empty || images * blocks < 6 ? W : 2 * W;
}

}  // namespace
}  // namespace vssm
