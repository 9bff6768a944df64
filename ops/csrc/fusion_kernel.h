// SPDX-License-Identifier: Apache-2.0
// The state fusion for one instruction set, see simd.h.
//
// One task takes a block of `lanes` channels of one image, a band of rows after the other, and of a wide map a strip of
// columns after the other. What they reach is first copied next to each other with the map's borders replicated, so that
// the sum itself meets no border.
#pragma once

#include "fusion.h"
#include "simd.h"

namespace vssm {
namespace {

// Columns of a strip, and rows of a band: few enough for the second-level cache, enough to make little of those around
// them.
template <class T>
int64_t strip_columns(const FusionArgs<T>& s) {
  return at_most(512, s.width);
}

template <class T>
int64_t band_rows(const FusionArgs<T>& s) {
  constexpr int64_t kBytes = 1 << 18;
  const int64_t rows = kBytes / ((strip_columns(s) + 4 * kReach) * s.lanes * int64_t(sizeof(T))) - 2 * kReach;
  return at_most(rows < 8 ? 8 : rows, s.height);
}

// out[p] = sum over taps of weight[tap] * in[p + offset[tap]] for `length` positions of one vector each.
template <class T>
void sum_taps(T* out, const T* in, int64_t length, const T* const* weight, const int64_t* offset, int taps) {
  constexpr int W = kWidth<T>, kTile = 8;
  int64_t p = 0;
  for (; p + kTile <= length; p += kTile) {
    Vec<T> sum[kTile] = {};
    for (int tap = 0; tap < taps; ++tap) {
      const Vec<T> w = load(weight[tap]);
      const T* from = in + offset[tap] + p * W;
      VSSM_UNROLL
      for (int q = 0; q < kTile; ++q) sum[q] += w * load(from + q * W);
    }
    VSSM_UNROLL
    for (int q = 0; q < kTile; ++q) store(out + (p + q) * W, sum[q]);
  }
  for (; p < length; ++p) {
    Vec<T> sum = {};
    for (int tap = 0; tap < taps; ++tap) sum += load(weight[tap]) * load(in + offset[tap] + p * W);
    store(out + p * W, sum);
  }
}

// The same for weights that are not finite, where position 0 is column `first` of the map: what `in` holds beyond the map
// is zero, but its product with such a weight is not.
template <class T>
void sum_taps_on_map(T* out, const T* in, int64_t length, const T* const* weight, const int64_t* offset,
                     const int* column, int taps, int64_t first, int64_t width) {
  constexpr int W = kWidth<T>;
  for (int64_t p = 0; p < length; ++p) {
    Vec<T> sum = {};
    for (int tap = 0; tap < taps; ++tap) {
      const int64_t from = first + p - column[tap];
      if (from >= 0 && from < width) sum += load(weight[tap]) * load(in + offset[tap] + p * W);
    }
    store(out + p * W, sum);
  }
}

template <class T>
bool all_finite(const T* values, int64_t size) {
  bool finite = true;
  for (int64_t i = 0; i < size; ++i) finite &= values[i] - values[i] == T(0);
  return finite;
}

// The columns [begin, end) of a row of the map; beyond it the border is repeated, or all is zero.
template <class T>
void copy_row(T* to, const char* row, Type type, int64_t step, int64_t width, int64_t valid, int64_t begin, int64_t end,
              bool repeat) {
  constexpr int W = kWidth<T>;
  const int64_t first = begin < 0 ? 0 : begin, last = at_most(end, width);
  gather(to + (first - begin) * W, W, row + first * step, type, step, last - first, valid);
  const Vec<T> zero = {};
  const Vec<T> left = repeat ? load(to + (first - begin) * W) : zero;
  const Vec<T> right = repeat ? load(to + (last - 1 - begin) * W) : zero;
  for (int64_t j = begin; j < first; ++j) store(to + (j - begin) * W, left);
  for (int64_t j = last; j < end; ++j) store(to + (j - begin) * W, right);
}

template <class T>
VSSM_INLINE const char* row_of(const RawMap& map, int64_t image, int64_t row, int64_t channel) {
  return map.data + image * map.batch + row * map.row + channel * size_of<T>(map.type);
}

// From position (row, column) of an image on, a vector of channels each, to a contiguous map.
template <class T>
VSSM_INLINE void put_row(const FusionArgs<T>& s, char* map, int64_t image, int64_t row, int64_t column, int64_t channel,
                         const T* from, int64_t length, int64_t valid) {
  const int64_t bytes = size_of<T>(s.h.type), position = (image * s.height + row) * s.width + column;
  char* const to = map + (position * s.channels + channel) * bytes;
  scatter(to, s.h.type, s.channels * bytes, from, kWidth<T>, kWidth<T>, length, valid);
}

// A rectangle of a map, [top, bottom) x [left, right).
struct Part {
  int64_t top, bottom, left, right;
};

// A part of h and what it reaches, with replicated borders, each row `stride` elements from the one before.
template <class T>
void copy_part(const FusionArgs<T>& s, T* to, int64_t stride, int64_t image, int64_t channel, int64_t valid,
               const Part& part) {
  for (int64_t r = part.top - kReach; r < part.bottom + kReach; ++r, to += stride) {
    const char* const row = row_of<T>(s.h, image, r < 0 ? 0 : at_most(r, s.height - 1), channel);
    copy_row(to, row, s.h.type, s.h.column, s.width, valid, part.left - kReach, part.right + kReach, true);
  }
}

// f(part) for every band of rows, and every strip of columns in it.
template <class T, class F>
VSSM_INLINE void each_part(const FusionArgs<T>& s, const F& f) {
  const int64_t band = band_rows(s), strip = strip_columns(s);
  for (int64_t top = 0; top < s.height; top += band)
    for (int64_t left = 0; left < s.width; left += strip)
      f(Part{top, at_most(top + band, s.height), left, at_most(left + strip, s.width)});
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
int64_t fusion_forward_scratch(const FusionArgs<T>& s) {
  const int64_t columns = strip_columns(s);
  return ((band_rows(s) + 2 * kReach) * (columns + 2 * kReach) + columns) * kWidth<T>;
}

template <class T>
void fusion_forward(const FusionArgs<T>& s, char* y, T* scratch, int64_t begin, int64_t end) {
  constexpr int W = kWidth<T>;
  const int64_t blocks = s.num_blocks(), stride = (strip_columns(s) + 2 * kReach) * W;
  T *rows = scratch, *sums = scratch + (band_rows(s) + 2 * kReach) * stride;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / blocks, block = task % blocks, channel = block * W;
    const int64_t valid = at_most(W, s.channels - channel);
    const T* weight[kTaps];
    int64_t offset[kTaps];
    for (int tap = 0; tap < kTaps; ++tap) {
      weight[tap] = s.weight(block) + tap * W;
      offset[tap] = kRows[tap] * stride + kColumns[tap] * W;
    }
    each_part(s, [&](const Part& part) {
      const int64_t columns = part.right - part.left;
      copy_part(s, rows, stride, image, channel, valid, part);
      for (int64_t i = part.top; i < part.bottom; ++i) {
        sum_taps(sums, rows + (i - part.top + kReach) * stride + kReach * W, columns, weight, offset, kTaps);
        put_row(s, y, image, i, part.left, channel, sums, columns, valid);
      }
    });
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------
// The gradient of a padded map is the sum with every tap turned around, on the gradient of y with zeros around it. What
// the border was repeated from then gets what its copies got.

template <class T>
int64_t fusion_backward_scratch(const FusionArgs<T>& s) {
  const int64_t rows = band_rows(s) + 2 * kReach, columns = strip_columns(s);
  return (rows * (2 * columns + 6 * kReach) + 2 * columns + 2 * kReach) * kWidth<T>;
}

// sum[m] += gy[p] * h[p + offset[m]] over a row.
template <class T, int M>
VSSM_INLINE void correlate(T* sum, const T* gy, const T* h, int64_t length, const int64_t* offset) {
  constexpr int W = kWidth<T>;
  Vec<T> s[M];
  const T* from[M];
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) {
    s[m] = load(sum + m * W);
    from[m] = h + offset[m];
  }
  for (int64_t p = 0; p < length; ++p) {
    const Vec<T> g = load(gy + p * W);
    VSSM_UNROLL
    for (int m = 0; m < M; ++m) s[m] += g * load(from[m] + p * W);
  }
  VSSM_UNROLL
  for (int m = 0; m < M; ++m) store(sum + m * W, s[m]);
}

// The gradient of h, of one part of it, from that of y: `gy` holds the rows of y's from `gy_top` on, y_stride elements from
// one to the next, and begins kReach columns before `wide`, the part with what the map's border stands for.
template <class T>
void fusion_backward_map(const FusionArgs<T>& s, char* dh, int64_t image, int64_t block, const Part& part,
                         const Part& wide, const T* gy, int64_t gy_top, int64_t y_stride, T* padded, T* folded,
                         bool finite) {
  constexpr int W = kWidth<T>;
  const int64_t channel = block * W, valid = at_most(W, s.channels - channel);
  const int64_t columns = part.right - part.left, wide_columns = wide.right - wide.left;
  for (int64_t r = wide.top; r < wide.bottom; ++r) {
    const T* weight[kTaps];
    int64_t offset[kTaps];
    int column[kTaps], taps = 0;
    for (int tap = 0; tap < kTaps; ++tap) {
      if (r - kRows[tap] < 0 || r - kRows[tap] >= s.height) continue;
      weight[taps] = s.weight(block) + tap * W;
      column[taps] = kColumns[tap];
      offset[taps++] = -kRows[tap] * y_stride - kColumns[tap] * W;
    }
    const T* const row = gy + (r - gy_top) * y_stride + kReach * W;
    if (finite) sum_taps(padded, row, wide_columns, weight, offset, taps);
    else sum_taps_on_map(padded, row, wide_columns, weight, offset, column, taps, wide.left, s.width);
    const bool begins = r == wide.top || (r > 0 && r < s.height);  // the first to write this row of the map
    const T* const inside = padded + (part.left - wide.left) * W;
    for (int64_t j = 0; j < columns; ++j) {
      Vec<T> sum = load(inside + j * W);
      if (j == 0)
        for (const T* p = padded; p < inside; p += W) sum += load(p);
      if (j == columns - 1)
        for (const T* p = inside + columns * W; p < padded + wide_columns * W; p += W) sum += load(p);
      if (!begins) sum += load(folded + j * W);
      store(folded + j * W, sum);
    }
    const bool ends = r == wide.bottom - 1 || (r >= 0 && r < s.height - 1);  // the last one
    if (!ends) continue;
    const int64_t to_row = r < 0 ? 0 : at_most(r, s.height - 1);
    put_row(s, dh, image, to_row, part.left, channel, folded, columns, valid);
  }
}

template <class T>
void fusion_backward(const FusionArgs<T>& s, const FusionGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  constexpr int W = kWidth<T>;
  const int64_t blocks = s.num_blocks(), rows = band_rows(s) + 2 * kReach, columns = strip_columns(s);
  const int64_t h_stride = (columns + 2 * kReach) * W;
  const int64_t y_stride = (columns + 4 * kReach) * W;  // a position of the padded map reaches so far beyond the map
  T *h = scratch, *gy = h + rows * h_stride, *padded = gy + rows * y_stride, *folded = padded + h_stride;
  int64_t h_offset[kTaps];
  for (int tap = 0; tap < kTaps; ++tap) h_offset[tap] = kRows[tap] * h_stride + kColumns[tap] * W;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / blocks, block = task % blocks, channel = block * W;
    const int64_t valid = at_most(W, s.channels - channel);
    const bool finite = all_finite(s.weight(block), kTaps * W);
    T* const dweight = grad.weight ? grad.weight + task * kTaps * W : nullptr;
    if (dweight) std::memset(dweight, 0, kTaps * W * sizeof(T));
    const int64_t last_image = (group + 1) * s.batch / grad.image_groups;
    for (int64_t image = group * s.batch / grad.image_groups; image < last_image; ++image) {
      each_part(s, [&](const Part& part) {
        // The part of the padded map that this part of the map stands for; the outermost have the border's too.
        const Part wide{part.top == 0 ? -kReach : part.top, part.bottom + (part.bottom == s.height ? kReach : 0),
                        part.left == 0 ? -kReach : part.left, part.right + (part.right == s.width ? kReach : 0)};
        const int64_t gy_top = wide.top < kReach ? 0 : wide.top - kReach, gy_left = wide.left - kReach;
        for (int64_t r = gy_top; r < at_most(wide.bottom + kReach, s.height); ++r) {
          const char* const row = row_of<T>(grad.y, image, r, channel);
          T* const to = gy + (r - gy_top) * y_stride;
          copy_row(to, row, grad.y.type, grad.y.column, s.width, valid, gy_left, wide.right + kReach, false);
        }
        if (dweight) {
          copy_part(s, h, h_stride, image, channel, valid, part);
          for (int64_t i = part.top; i < part.bottom; ++i) {
            const T* const g = gy + (i - gy_top) * y_stride + (part.left - gy_left) * W;
            const T* const from_h = h + (i - part.top + kReach) * h_stride + kReach * W;
            const int64_t length = part.right - part.left;
            correlate<T, 9>(dweight, g, from_h, length, h_offset);
            correlate<T, 8>(dweight + 9 * W, g, from_h, length, h_offset + 9);
            correlate<T, 8>(dweight + 17 * W, g, from_h, length, h_offset + 17);
          }
        }
        if (grad.h)
          fusion_backward_map(s, grad.h, image, block, part, wide, gy, gy_top, y_stride, padded, folded, finite);
      });
    }
  }
}

}  // namespace
}  // namespace vssm
