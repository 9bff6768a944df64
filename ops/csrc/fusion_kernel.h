// SPDX-License-Identifier: Apache-2.0
// The state fusion for one instruction set, see simd.h.
//
// One task takes a block of `lanes` channels of one image, a band of rows after the other. The rows that a band reaches
// are first copied next to each other with their borders replicated, so that the sum itself meets no border.
#pragma once

#include "fusion.h"
#include "simd.h"

namespace vssm {
namespace {

// Rows of a band: few enough for the second-level cache, enough to make little of the rows around them.
template <class T>
int64_t band_rows(const FusionArgs<T>& s) {
  constexpr int64_t kBytes = 1 << 18;
  const int64_t rows = kBytes / ((s.width + 4 * kReach) * s.lanes * int64_t(sizeof(T))) - 2 * kReach;
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

// A row of the map between `margin` columns on either side: repeated, or zero.
template <class T>
void copy_row(T* to, const T* from, int64_t step, int64_t width, int64_t valid, int margin, bool repeat) {
  constexpr int W = kWidth<T>;
  gather(to + margin * W, W, from, step, width, valid);
  const Vec<T> zero = {};
  const Vec<T> left = repeat ? load(to + margin * W) : zero;
  const Vec<T> right = repeat ? load(to + (margin + width - 1) * W) : zero;
  for (int m = 0; m < margin; ++m) {
    store(to + m * W, left);
    store(to + (margin + width + m) * W, right);
  }
}

template <class T>
VSSM_INLINE const T* row_of(const Map<const T>& map, int64_t image, int64_t row, int64_t channel) {
  return map.data + image * map.batch + row * map.row + channel;
}

// The rows [first - kReach, last + kReach) of h with replicated borders, each width + 2 kReach wide.
template <class T>
void copy_band(const FusionArgs<T>& s, T* to, int64_t image, int64_t channel, int64_t valid, int64_t first,
               int64_t last) {
  const int64_t size = (s.width + 2 * kReach) * kWidth<T>;
  for (int64_t r = first - kReach; r < last + kReach; ++r, to += size) {
    const int64_t row = r < 0 ? 0 : at_most(r, s.height - 1);
    copy_row(to, row_of(s.h, image, row, channel), s.h.column, s.width, valid, kReach, true);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
int64_t fusion_forward_scratch(const FusionArgs<T>& s) {
  return ((band_rows(s) + 2 * kReach) * (s.width + 2 * kReach) + s.width) * kWidth<T>;
}

template <class T>
void fusion_forward(const FusionArgs<T>& s, T* y, T* scratch, int64_t begin, int64_t end) {
  constexpr int W = kWidth<T>;
  const int64_t blocks = s.num_blocks(), band = band_rows(s), stride = (s.width + 2 * kReach) * W;
  T *rows = scratch, *sums = scratch + (band + 2 * kReach) * stride;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / blocks, block = task % blocks, channel = block * W;
    const int64_t valid = at_most(W, s.channels - channel);
    const T* weight[kTaps];
    int64_t offset[kTaps];
    for (int tap = 0; tap < kTaps; ++tap) {
      weight[tap] = s.weight(block) + tap * W;
      offset[tap] = kRows[tap] * stride + kColumns[tap] * W;
    }
    for (int64_t first = 0; first < s.height; first += band) {
      const int64_t last = at_most(first + band, s.height);
      copy_band(s, rows, image, channel, valid, first, last);
      for (int64_t i = first; i < last; ++i) {
        sum_taps(sums, rows + (i - first + kReach) * stride + kReach * W, s.width, weight, offset, kTaps);
        scatter(y + ((image * s.height + i) * s.width) * s.channels + channel, s.channels, sums, W, s.width, valid);
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------
// The gradient of a padded map is the sum with every tap turned around, on the gradient of y with zeros around it. What
// the border was repeated from then gets what its copies got.

template <class T>
int64_t fusion_backward_scratch(const FusionArgs<T>& s) {
  const int64_t rows = band_rows(s) + 2 * kReach;
  return (rows * (2 * s.width + 6 * kReach) + 2 * s.width + 2 * kReach) * kWidth<T>;
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

template <class T>
void fusion_backward(const FusionArgs<T>& s, const FusionGrads<T>& grad, T* scratch, int64_t begin, int64_t end) {
  constexpr int W = kWidth<T>;
  constexpr int kZeros = 2 * kReach;  // a position of the padded map reaches so far beyond the map
  const int64_t blocks = s.num_blocks(), band = band_rows(s), rows = band + 2 * kReach;
  const int64_t h_stride = (s.width + 2 * kReach) * W, y_stride = (s.width + 2 * kZeros) * W;
  T *h = scratch, *gy = h + rows * h_stride, *padded = gy + rows * y_stride, *folded = padded + h_stride;
  int64_t h_offset[kTaps], y_offset[kTaps];
  for (int tap = 0; tap < kTaps; ++tap) {
    h_offset[tap] = kRows[tap] * h_stride + kColumns[tap] * W;
    y_offset[tap] = -kRows[tap] * y_stride - kColumns[tap] * W;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / blocks, block = task % blocks, channel = block * W;
    const int64_t valid = at_most(W, s.channels - channel);
    T* const dweight = grad.weight + task * kTaps * W;
    std::memset(dweight, 0, kTaps * W * sizeof(T));
    const int64_t last_image = (group + 1) * s.batch / grad.image_groups;
    for (int64_t image = group * s.batch / grad.image_groups; image < last_image; ++image) {
      for (int64_t first = 0; first < s.height; first += band) {
        const int64_t last = at_most(first + band, s.height);
        // The rows of the padded map that this band of the map stands for; the outermost bands have the border's too.
        const int64_t from = first == 0 ? -kReach : first, to = last == s.height ? last + kReach : last;
        const int64_t gy_first = from - kReach < 0 ? 0 : from - kReach, gy_last = at_most(to + kReach, s.height);
        for (int64_t r = gy_first; r < gy_last; ++r) {
          const T* row = row_of(grad.y, image, r, channel);
          copy_row(gy + (r - gy_first) * y_stride, row, grad.y.column, s.width, valid, kZeros, false);
        }
        copy_band(s, h, image, channel, valid, first, last);

        for (int64_t i = first; i < last; ++i) {
          const T* g = gy + (i - gy_first) * y_stride + kZeros * W;
          const T* from_h = h + (i - first + kReach) * h_stride + kReach * W;
          correlate<T, 9>(dweight, g, from_h, s.width, h_offset);
          correlate<T, 8>(dweight + 9 * W, g, from_h, s.width, h_offset + 9);
          correlate<T, 8>(dweight + 17 * W, g, from_h, s.width, h_offset + 17);
        }

        for (int64_t r = from; r < to; ++r) {
          const T* weight[kTaps];
          int64_t offset[kTaps];
          int taps = 0;
          for (int tap = 0; tap < kTaps; ++tap) {
            if (r - kRows[tap] < 0 || r - kRows[tap] >= s.height) continue;
            weight[taps] = s.weight(block) + tap * W;
            offset[taps++] = y_offset[tap];
          }
          // Position 0 of the padded row stands kReach left of the map.
          sum_taps(padded, gy + (r - gy_first) * y_stride + kReach * W, s.width + 2 * kReach, weight, offset, taps);
          const bool begins = r == from || (r > 0 && r < s.height);  // the first to write this row of the map
          for (int64_t j = 0; j < s.width; ++j) {
            Vec<T> sum = load(padded + (j + kReach) * W);
            if (j == 0)
              for (int m = 0; m < kReach; ++m) sum += load(padded + m * W);
            if (j == s.width - 1)
              for (int m = 0; m < kReach; ++m) sum += load(padded + (s.width + kReach + m) * W);
            if (!begins) sum += load(folded + j * W);
            store(folded + j * W, sum);
          }
          const bool ends = r == to - 1 || (r >= 0 && r < s.height - 1);  // the last one
          if (!ends) continue;
          const int64_t row = r < 0 ? 0 : at_most(r, s.height - 1);
          T* const dh = grad.h + (image * s.height + row) * s.width * s.channels + channel;
          scatter(dh, s.channels, folded, W, s.width, valid);
        }
      }
    }
  }
}

}  // namespace
}  // namespace vssm
