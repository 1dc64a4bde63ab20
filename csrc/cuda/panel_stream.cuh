// Panels of weights on their way to shared memory, 16 bytes at a time.
//
// A thread copies the same place of every kHop-th line of each panel, a line being what lies
// contiguously: a row, or where the columns are contiguous, a column. So it keeps one pointer.
#pragma once

#include "cuda/instructions.h"
#include "cuda/spectral_plan.h"

namespace tb::gpu {

template <typename T, int kRows, bool kTransposed>
class PanelStream {
 public:
  // From row `first_row` of the segment that begins at `first_column`.
  __device__ PanelStream(const SpectralEntry& e, int64_t first_row, int64_t first_column)
      : from_(static_cast<const T*>(e.data) + (first_row + own_row()) * e.row_stride +
              (first_column + own_column()) * e.col_stride) {}

  // Starts copying the next panel, of which `rows` by `columns` are in the matrix; zeros for the
  // rest.
  //   place(row, column): where in `to` a number goes
  template <typename Place>
  __device__ void fetch(const SpectralEntry& e, T* to, int rows, int columns, Place place) {
    const int64_t hop = kHop * (kTransposed ? e.col_stride : e.row_stride);
#pragma unroll 2
    for (int i = 0; i < kCopies; ++i) {
      const int row = own_row() + (kTransposed ? 0 : i * kHop);
      const int column = own_column() + (kTransposed ? i * kHop : 0);
      const bool inside = row < rows && column < columns;
      cp_async_16(to + place(row, column), from_ + i * hop, inside ? 16 : 0);
    }
    from_ += kRows * e.row_stride;
  }

 private:
  static constexpr int kRun = 16 / static_cast<int>(sizeof(T));            // numbers of a copy
  static constexpr int kAcross = (kTransposed ? kRows : kSegment) / kRun;  // copies of a line
  static constexpr int kHop = kThreads / kAcross;
  static constexpr int kCopies = (kTransposed ? kSegment : kRows) / kHop;  // of a thread

  // Of the place that this thread copies, in the first of its lines.
  __device__ static int own_row() {
    const int thread = fresh_thread_index();
    return kTransposed ? thread % kAcross * kRun : thread / kAcross;
  }
  __device__ static int own_column() {
    const int thread = fresh_thread_index();
    return kTransposed ? thread / kAcross : thread % kAcross * kRun;
  }

  const T* from_;
};

}  // namespace tb::gpu
