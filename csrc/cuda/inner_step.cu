#include "cuda/inner_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/inner_step.cuh"
#include "cuda/launch.h"

namespace tb::gpu {
namespace {

// Elements of a tile: enough to be long beside its start, few enough that small matrices keep many
// blocks busy.
constexpr int64_t kShortTile = 1 << 15, kLongTile = 1 << 18, kLarge = int64_t{1} << 22;
constexpr int64_t kRunBytes = 16;  // of a run of weights that are read at once

int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

int64_t width(const Matrix& m) { return m.cols * (is_complex(m.dtype) ? 2 : 1); }

InnerEntry entry_of(const Matrix& m, int64_t rows, bool kept) {
  InnerEntry e{};
  e.data = m.data;
  e.row_stride = m.row_stride;
  e.col_stride = m.col_stride;
  e.rows = static_cast<int32_t>(rows);
  e.cols = static_cast<int32_t>(m.cols);
  e.dtype = m.dtype;
  // Kept rows lie apart, so columns of them are never contiguous.
  e.down = !kept && m.row_stride < m.col_stride && m.rows > 1 ? 1 : 0;
  const int64_t along = e.down != 0 ? m.row_stride : m.col_stride;
  const int64_t across = e.down != 0 ? m.col_stride : m.row_stride;
  const int64_t run = kRunBytes / element_bytes(m.dtype);
  const bool aligned = along == 1 && across % run == 0 &&
                       (e.down != 0 ? m.rows : m.cols) % run == 0 &&
                       reinterpret_cast<uintptr_t>(m.data) % kRunBytes == 0;
  e.run = aligned ? static_cast<int32_t>(run) : 1;
  const int64_t size = m.rows * m.cols < kLarge ? kShortTile : kLongTile;
  if (e.down != 0) {
    const int64_t cols = std::min(m.cols, size / kStrip);
    e.tile_cols = static_cast<int32_t>(cols);
    e.tile_rows = static_cast<int32_t>(pieces(size / cols, kStrip) * kStrip);
  } else {
    int64_t cols = e.run;
    while (cols < m.cols && cols < int64_t{e.run} * kThreads) cols *= 2;
    e.tile_cols = static_cast<int32_t>(cols);
    e.tile_rows = static_cast<int32_t>(pieces(size, cols));
  }
  return e;
}

// The tiles of a layer. Those at the same place of several matrices follow each other: the slices
// of a convolution lie interleaved, and what one leaves in the cache serves the next.
std::vector<InnerItem> items_of(const std::vector<InnerEntry>& entries, size_t begin) {
  std::vector<InnerItem> items;
  for (size_t i = begin; i < entries.size(); ++i) {
    const InnerEntry& e = entries[i];
    for (int64_t row = 0; row < e.rows; row += e.tile_rows) {
      for (int64_t column = 0; column < e.cols; column += e.tile_cols) {
        items.push_back(
            {static_cast<int32_t>(i), static_cast<int32_t>(row), static_cast<int32_t>(column)});
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const InnerItem& a, const InnerItem& b) {
    return a.row != b.row ? a.row < b.row : a.column < b.column;
  });
  return items;
}

template <typename T>
T* at(uintptr_t workspace, int64_t offset) {
  return reinterpret_cast<T*>(workspace + static_cast<uintptr_t>(offset));
}

void launch_step(void (*kernel)(InnerArgs), const InnerArgs& a, int64_t wanted, uintptr_t stream,
                 int64_t blocks) {
  const int64_t resident = resident_blocks(kernel, 0);
  if (blocks == 0) blocks = std::min(resident, wanted);
  if (blocks < 1 || blocks > resident) {
    throw std::invalid_argument("the device runs 1 to " + std::to_string(resident) +
                                " blocks of this kernel at once; asked for " +
                                std::to_string(blocks));
  }
  tb::gpu::launch(kernel, static_cast<int>(blocks), 0, a, stream);
}

}  // namespace

InnerPlan::InnerPlan(const std::vector<Matrix>& matrices, int64_t layers,
                     const std::vector<int64_t>* kept, int columns)
    : layers_(layers) {
  std::vector<InnerEntry> entries;
  std::vector<InnerItem> items;
  std::vector<int64_t> first_item{0};
  std::vector<int32_t> rows;
  int64_t first_row = 0, other = 0;
  size_t next = 0;  // kept row
  auto matrix = matrices.begin();
  for (int64_t layer = 0; layer < layers; ++layer) {
    const size_t begin = entries.size();
    for (; matrix != matrices.end() && matrix->layer == layer; ++matrix) {
      const auto mine = static_cast<int64_t>(rows.size());
      for (; kept != nullptr && next < kept->size(); ++next) {
        const int64_t row = (*kept)[next] - first_row;
        if (row >= matrix->rows) break;
        if (row < 0 || (next > 0 && (*kept)[next] <= (*kept)[next - 1])) {
          throw std::invalid_argument("kept rows must ascend, from 0 on");
        }
        rows.push_back(static_cast<int32_t>(row));
      }
      const int64_t count =
          kept == nullptr ? matrix->rows : static_cast<int64_t>(rows.size()) - mine;
      InnerEntry e = entry_of(*matrix, count, kept != nullptr);
      e.other = other;
      e.first_row = kept == nullptr ? first_row : mine;
      entries.push_back(e);
      other += count * width(*matrix);
      first_row += matrix->rows;
    }
    const std::vector<InnerItem> more = items_of(entries, begin);
    items.insert(items.end(), more.begin(), more.end());
    first_item.push_back(static_cast<int64_t>(items.size()));
  }
  if (kept != nullptr && next != kept->size()) {
    throw std::invalid_argument("kept row " + std::to_string((*kept)[next]) +
                                " is not one of the " + std::to_string(first_row) +
                                " rows of this batch");
  }
  items_ = static_cast<int64_t>(items.size());
  tables_.entries = arena_.put(entries);
  tables_.items = arena_.put(items);
  tables_.first_item = arena_.put(first_item);
  tables_.rows = arena_.put(rows);
  tables_.sums = arena_.take<double>(items_ * columns);
}

InnerArgs InnerPlan::args(uintptr_t workspace, uintptr_t results) const {
  InnerArgs a{};
  a.entries = at<const InnerEntry>(workspace, tables_.entries);
  a.items = at<const InnerItem>(workspace, tables_.items);
  a.first_item = at<const int64_t>(workspace, tables_.first_item);
  a.item_count = items_;
  a.layers = layers_;
  a.sums = at<double>(workspace, tables_.sums);
  a.results = reinterpret_cast<double*>(results);
  return a;
}

void DotPlan::launch(uintptr_t values, uintptr_t scales, uintptr_t workspace, uintptr_t results,
                     uintptr_t stream, int64_t blocks) const {
  InnerArgs a = args(workspace, results);
  a.others = reinterpret_cast<const void*>(values);
  a.scales = reinterpret_cast<const float*>(scales);
  launch_step(dot_step, a, most_blocks(), stream, blocks);
}

void DriftPlan::launch(uintptr_t values, uintptr_t workspace, uintptr_t results, uintptr_t stream,
                       int64_t blocks) const {
  InnerArgs a = args(workspace, results);
  a.others = reinterpret_cast<const void*>(values);
  a.kept = at<const int32_t>(workspace, tables_.rows);
  launch_step(drift_step, a, most_blocks(), stream, blocks);
}

}  // namespace tb::gpu
