// SPDX-License-Identifier: Apache-2.0
// The walk of the selective scan: which position follows which.
//
// One task follows all walks of one image for a block of channels, which fill the lanes of one or two vectors. A walk
// goes line by line, and a line is cut into chunks, small enough for the first-level cache. Within a chunk what has no
// recurrence comes first, for many positions at once (scan_steps.h), then the recurrence alone (scan_forward.h,
// scan_backward.h).
#pragma once

#include "scan.h"
#include "simd.h"

namespace vssm {
namespace {

constexpr int64_t kChunk = 64;  // positions

// What a tensor holds for the positions of a chunk: that of position t begins at data + t * step.
template <class T>
struct Rows {
  T* data;
  int64_t step;
  VSSM_INLINE T* operator[](int64_t t) const { return data + t * step; }
};

// One tensor along one walk.
template <class T>
struct Line {
  T* origin;
  int64_t outer, inner;  // elements from one line to the next, and from one position of a line to the next
  VSSM_INLINE T* at(int64_t i, int64_t j) const { return origin + i * outer + j * inner; }
  VSSM_INLINE Rows<T> rows(int64_t i, int64_t j, int64_t n = 0) const { return {at(i, j) + n, inner}; }
};

// The extent of a walk: the number of its lines, and of the positions of a line. A map of one column is walked as one
// row, so that chunks are long.
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

  // The tensor's values for one image and order, from `offset` on in its last axis.
  template <class T>
  Line<T> line(const Map<T>& map, int64_t image, int64_t k, int64_t offset = 0) const {
    Line<T> l{map.data + image * map.batch + k * map.order + offset, map.row, map.column};
    if (transposed) l = {l.origin, map.column, map.row};
    if (reversed) l = {l.at(outer - 1, inner - 1), -l.outer, -l.inner};
    return l;
  }
};

// The lanes of a block: two vectors; or one where the channels fill no more or leave half of the last block empty, or
// where so few blocks would leave a thread idle.
template <class T>
int64_t scan_lanes(int64_t images, int64_t channels) {
  constexpr int W = kWidth<T>;
  const int64_t last = channels % (2 * W), blocks = (channels + 2 * W - 1) / (2 * W);
  const bool half_empty = last && last <= W && channels < 8 * W;
  return half_empty || images * blocks < 6 ? W : 2 * W;
}

}  // namespace
}  // namespace vssm
