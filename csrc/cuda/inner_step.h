// Sums over all elements of each layer of a ragged batch, in one read and one launch on a GPU: how
// far weights have moved, and in which direction. The definitions are `dot` and `drift` in
// tbfast/backends/reference.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/arena.h"
#include "ragged.h"

namespace tb::gpu {

constexpr int kDotColumns = 2;    // of a row of results: <G, W>, |W|^2
constexpr int kDriftColumns = 3;  // |W - W_0|^2, <W - W_0, W_0>, |W_0|^2

// A matrix, or its kept rows, and the tiles that it is cut into. Sizes are in elements.
struct InnerEntry {
  const void* data;
  int64_t row_stride, col_stride;
  int64_t other;      // where its numbers of G or W_0 begin
  int64_t first_row;  // where its scales, or its kept rows, begin
  int32_t rows, cols;
  int32_t tile_rows, tile_cols;
  DType dtype;
  int32_t run;   // elements that a thread reads at once: 16 bytes, or one element
  int32_t down;  // 1: it is read along columns
};

// A work item: the tile of a matrix that begins at this element.
struct InnerItem {
  int32_t matrix, row, column;
};

// What the kernels are given. Pointers are the device's.
struct InnerArgs {
  const InnerEntry* entries;
  const InnerItem* items;
  const int64_t* first_item;  // (layers + 1)
  const int32_t* kept;        // rows of their matrices; null: all
  int64_t item_count, layers;
  const void* others;   // G or W_0
  const float* scales;  // of the rows of G
  double* sums;         // (items, columns)
  double* results;      // (layers, columns)
};

// Host only. What the two verbs share: tables, and room for a row of sums of each work item. Tiles
// depend on shapes alone, so no result depends on the grid or on which other matrices there are.
class InnerPlan {
 public:
  // The workspace begins with these bytes; what follows may hold anything.
  const std::vector<unsigned char>& image() const { return arena_.image(); }
  int64_t workspace_bytes() const { return arena_.size(); }

  // Blocks that all work can use.
  int64_t most_blocks() const { return std::max<int64_t>({items_, layers_, 1}); }

 protected:
  InnerPlan(const std::vector<Matrix>& matrices, int64_t layers, const std::vector<int64_t>* kept,
            int columns);

  InnerArgs args(uintptr_t workspace, uintptr_t results) const;

  struct Offsets {
    int64_t entries, items, first_item, rows, sums;
  };
  Offsets tables_{};
  Arena arena_;
  int64_t layers_, items_ = 0;
};

class DotPlan : public InnerPlan {
 public:
  DotPlan(const std::vector<Matrix>& matrices, int64_t layers)
      : InnerPlan(matrices, layers, nullptr, kDotColumns) {}

  // values: G as int8, (rows, width) of each matrix, end to end: complex numbers are (re, im)
  // scales: float32, one for each row, end to end; G = scale * value
  // results: float64 (layers, kDotColumns), may be pinned memory; not finite for a layer with a
  //   weight that is not
  // blocks: 0 for as many as fit on the device, if they are of use
  void launch(uintptr_t values, uintptr_t scales, uintptr_t workspace, uintptr_t results,
              uintptr_t stream, int64_t blocks) const;
};

class DriftPlan : public InnerPlan {
 public:
  // rows: ascending; the rows of all matrices are numbered end to end
  // Throws std::invalid_argument where they are not.
  DriftPlan(const std::vector<Matrix>& matrices, int64_t layers, const std::vector<int64_t>& rows)
      : InnerPlan(matrices, layers, &rows, kDriftColumns) {}

  // values: W_0 as float32, (width) of each kept row, end to end
  // results: float64 (layers, kDriftColumns), as above
  void launch(uintptr_t values, uintptr_t workspace, uintptr_t results, uintptr_t stream,
              int64_t blocks) const;
};

}  // namespace tb::gpu
