#include "cuda/rsvd_plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace tb::gpu {
namespace {

constexpr int64_t kStep = 16;          // sketches have a multiple of it: see reference_rsvd.py
constexpr int64_t kLeastDepth = 1024;  // of a slice: below it, adding slices up costs too much
constexpr int64_t kProducts = 256;     // work items of a product that keep a GPU busy
constexpr int64_t kLeastStrip = 256;   // rows
constexpr int64_t kMostStrips = 32;    // that one block adds up
constexpr double kPi = 3.14159265358979323846;
constexpr int64_t kAlignment = 256;  // bytes

int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// Bytes of the numbers that a matrix of this type is computed with.
int64_t scalar_bytes(DType t) { return std::max<int64_t>(element_bytes(t), 4); }

// Offset of `bytes` more.
int64_t take(int64_t& size, int64_t bytes) {
  const int64_t offset = size;
  size += pieces(bytes, kAlignment) * kAlignment;
  return offset;
}

RsvdSide side_of(int64_t length, int64_t depth, int64_t rows_of_tile) {
  RsvdSide s{};
  s.length = length;
  s.tiles = static_cast<int32_t>(pieces(length, rows_of_tile));
  const int64_t wanted = pieces(kProducts, s.tiles);
  s.slice_depth = std::max(kLeastDepth, pieces(pieces(depth, wanted), 64) * 64);
  s.slices = static_cast<int32_t>(pieces(depth, s.slice_depth));
  s.strip_rows = std::max(kLeastStrip, pieces(length, kMostStrips));
  s.strips = static_cast<int32_t>(pieces(length, s.strip_rows));
  return s;
}

std::vector<double> shifts_of(int64_t iterations) {
  std::vector<double> shifts;
  for (int64_t i = 0; i < iterations; ++i) {
    const double root = std::cos((2.0 * static_cast<double>(i) + 1) /
                                 (2.0 * static_cast<double>(iterations) + 1) * kPi / 2);
    shifts.push_back(root * root);
  }
  return shifts;
}

std::string shape(const Matrix& m) {
  return "(" + std::to_string(m.rows) + ", " + std::to_string(m.cols) + ")";
}

}  // namespace

RsvdPlan::RsvdPlan(const std::vector<Matrix>& matrices, const RsvdOptions& options) {
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    if (options.rank > m.count()) {
      throw std::invalid_argument("rank is above the shorter side of matrix " + std::to_string(i));
    }
    const int64_t wanted = pieces(options.rank + options.oversample, kStep) * kStep;
    const int64_t columns = std::min(wanted, m.count());
    if (columns > kSketch) {
      throw std::invalid_argument(
          "matrix " + std::to_string(i) + " of shape " + shape(m) + " needs a sketch of " +
          std::to_string(columns) + " columns for rank=" + std::to_string(options.rank) +
          " and oversample=" + std::to_string(options.oversample) + ", but the GPU kernel has " +
          std::to_string(kSketch) + " at most; use fewer, or backend='native'");
    }
    add(m, options, columns);
  }
  most_items = static_cast<int64_t>(entries.size());
  for (int side = 0; side < kSides; ++side) {
    for (const auto* items : {&products[side], &tiles[side], &grams[side]}) {
      most_items = std::max(most_items, static_cast<int64_t>(items->size()));
    }
  }
}

void RsvdPlan::add(const Matrix& m, const RsvdOptions& options, int64_t columns) {
  RsvdEntry e{};
  const bool tall = m.rows > m.cols;
  const int64_t rows = m.count(), cols = std::max(m.rows, m.cols);
  const int64_t scalar = scalar_bytes(m.dtype), wide = is_complex(m.dtype) ? 16 : 8;
  const int64_t small = columns * columns;
  e.data = m.data;
  e.row_stride = tall ? m.col_stride : m.row_stride;
  e.col_stride = tall ? m.row_stride : m.col_stride;
  e.dtype = m.dtype;
  e.tall = tall ? 1 : 0;
  e.columns = static_cast<int32_t>(columns);
  e.iterates = columns < rows && options.power_iters > 0 ? 1 : 0;
  const int64_t rows_of_tile = tile_rows(static_cast<int>(scalar));
  e.side[0] = side_of(rows, cols, rows_of_tile);
  e.side[1] = side_of(cols, rows, rows_of_tile);

  int64_t in_pieces = 0, strips = 0;
  for (RsvdSide& s : e.side) {
    s.block = take(memory, s.length * columns * scalar);
    s.multiplier = take(memory, small * scalar);
    if (s.slices > 1) in_pieces = std::max(in_pieces, s.slices * s.length * columns);
    strips = std::max<int64_t>(strips, s.strips);
  }
  e.pieces = take(memory, in_pieces * scalar);
  e.gram = take(memory, strips * small * wide);
  e.total = take(memory, 2 * small * wide);
  e.scratch = take(memory, 2 * small * wide);
  e.values = take(memory, columns * int64_t{sizeof(double)});
  e.sums = take(memory, 2 * int64_t{e.side[0].tiles} * e.side[0].slices * int64_t{sizeof(double)});
  e.low = take(memory, columns * int64_t{sizeof(int32_t)});
  e.out[0] = take(out_bytes, m.rows * options.rank * scalar);
  e.out[1] = take(out_bytes, options.rank * int64_t{sizeof(double)});
  e.out[2] = take(out_bytes, options.rank * m.cols * scalar);

  const auto matrix = static_cast<int32_t>(entries.size());
  const int pairs = columns > kGramBlock ? 3 : 1;
  for (int side = 0; side < kSides; ++side) {
    const RsvdSide& s = e.side[side];
    for (int32_t tile = 0; tile < s.tiles; ++tile) {
      tiles[side].push_back({matrix, tile, 0});
      for (int32_t slice = 0; slice < s.slices; ++slice) {
        products[side].push_back({matrix, tile, slice});
      }
    }
    for (int32_t strip = 0; strip < s.strips; ++strip) {
      for (int32_t pair = 0; pair < pairs; ++pair) grams[side].push_back({matrix, strip, pair});
    }
    sliced[side] = sliced[side] || s.slices > 1;
  }
  if (e.iterates != 0) shifts = shifts_of(options.power_iters);
  entries.push_back(e);
}

}  // namespace tb::gpu
