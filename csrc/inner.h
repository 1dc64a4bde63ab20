// Sums over all elements of a layer: how far weights have moved, and in which direction.
#pragma once

#include <cstdint>
#include <vector>

#include "ragged.h"

namespace tb {

// Elements of a matrix as real numbers: twice as many where it is complex, (re, im) interleaved.
inline int64_t width(const Matrix& m) { return m.cols * (is_complex(m.dtype) ? 2 : 1); }

struct InnerProduct {
  double dot;     // <G, W>
  double square;  // |W|^2
};

// <G, W> and |W|^2 of each layer in one read of both, threaded over panels of rows whose sums are
// added in order. A layer with an entry that is not finite gets a square that is not finite.
//   values: G as int8, (rows, width) of each matrix, end to end
//   scales: one for each row, end to end; G = scale * value
std::vector<InnerProduct> dot(const std::vector<Matrix>& matrices, int64_t layers,
                              const int8_t* values, const float* scales, int threads);

struct Movement {
  double moved;  // |W - W_0|^2
  double along;  // <W - W_0, W_0>
  double size;   // |W_0|^2
};

// How far the kept rows of each layer have moved from W_0.
//   rows:   `count` of them, ascending; the rows of all matrices are numbered end to end
//   values: W_0, (width) of each of those rows, end to end
std::vector<Movement> drift(const std::vector<Matrix>& matrices, int64_t layers,
                            const int64_t* rows, int64_t count, const float* values, int threads);

}  // namespace tb
