// A tile of a product of two matrices whose second has at most kSketch columns.
//
//   for each chunk of the depth
//     chunks of both operands go to shared memory; the first one's next is on its way to registers
//     each thread adds up its rows of 16 bytes by every 16th column
//
// Operands are functions of row and column: weights of any type and strides, read along whichever
// way they lie; blocks in memory; random signs, of which one Philox counter gives a whole row.
#pragma once

#include <limits>

#include "cuda/block.h"
#include "cuda/rsvd_args.h"
#include "cuda/rsvd_scalar.cuh"
#include "philox.h"

namespace tb::gpu {

constexpr int kGroup = 16;                 // threads across a tile, and down
constexpr int kGroups = kSketch / kGroup;  // columns of a thread
constexpr int kWords = kSketch / 32;       // of a row of signs
constexpr double kInfinite = std::numeric_limits<double>::infinity();

__device__ inline int thread_index() { return fresh_thread_index(); }
__device__ inline int lane() { return thread_index() % kLanes; }
__device__ inline int warp() { return thread_index() / kLanes; }
__device__ inline int thread_across() { return thread_index() % kGroup; }
__device__ inline int thread_down() { return thread_index() / kGroup; }

template <typename T>
__device__ inline T* at(const RsvdArgs& a, int64_t offset) {
  return reinterpret_cast<T*>(a.memory + offset);
}

template <typename S>
struct Tile {
  static constexpr int kOwn = 16 / static_cast<int>(sizeof(S));  // rows of a thread
  static constexpr int kRows = kGroup * kOwn;
  static constexpr int kDepth = sizeof(S) == 4 ? 32 : 16;
  static constexpr int kLeft = kRows * kDepth / kThreads;  // numbers of a chunk that a thread reads
  static_assert(kRows == tile_rows(sizeof(S)), "the plan and the kernel cut rows alike");

  struct alignas(16) Own {
    S row[kOwn];
  };
  struct Shared {
    Own left[kDepth][kGroup + 1];  // one more, to spread columns over the banks
    S right[kDepth][kSketch];
    uint32_t bits[2][kDepth][kWords];
  };
  S sum[kOwn][kGroups];
};

// A matrix of weights times a power of two, or its adjoint.
template <typename Stored>
struct Weights {
  using S = typename ScalarOf<Stored>::type;
  const Stored* data;
  int64_t row_stride, col_stride;
  RealOf<S> scale;
  bool adjoint;
  bool measures;  // whether the sum of squares and the largest entry are wanted
  double squares, top;

  __device__ Weights(const RsvdEntry& e, int side, double scale)
      : data(static_cast<const Stored*>(e.data)),
        row_stride(side == 0 ? e.row_stride : e.col_stride),
        col_stride(side == 0 ? e.col_stride : e.row_stride),
        scale(static_cast<RealOf<S>>(scale)),
        adjoint((side == 1) != (e.tall != 0)),
        measures(false),
        squares(0),
        top(0) {}

  // The number at an offset from the first.
  __device__ S operator()(int64_t offset) {
    S value = scalar(load_counted(data + offset)) * scale;
    if (adjoint) value = conjugate(value);
    if (measures) {
      const double largest = size(widen(value));
      squares += square(widen(value));
      if (!(largest <= top)) top = largest < kInfinite ? largest : kInfinite;
    }
    return value;
  }
};

// A block in memory, row by row.
template <typename S>
struct Rows {
  const S* data;
  int64_t row_stride;
  static constexpr int64_t col_stride = 1;

  __device__ S operator()(int64_t offset) const { return data[offset]; }
};

// The second operand: a block in memory or, where there is none, random signs.
template <typename S>
struct Columns {
  const S* data;
  int64_t stride;
  Stream stream;

  __device__ void prepare(int64_t first, int64_t end, uint32_t (*bits)[kWords]) const {
    const int own = thread_index();
    if (data != nullptr || own >= Tile<S>::kDepth || first + own >= end) return;
    const Philox words = stream.bits(static_cast<uint64_t>(first + own));
    for (int w = 0; w < kWords; ++w) bits[own][w] = words.word[w];
  }
  __device__ S operator()(int64_t row, int column, const uint32_t* bits) const {
    if (data != nullptr) return data[row * stride + column];
    return from_parts<S>((bits[column / 32] >> (column % 32) & 1) != 0 ? -1 : 1, 0);
  }
};

// tile = left * right, of `rows` rows from `first_row` on and `width` columns, over the depth from
// `begin` to `end`.
template <typename S, typename Left, typename Right>
__device__ inline void multiply(Left& left, const Right& right, int64_t first_row, int rows,
                                int64_t begin, int64_t end, int width, Tile<S>& tile,
                                typename Tile<S>::Shared& s) {
  using T = Tile<S>;
  // What a thread reads of a chunk of the left operand, in the order in which it lies in memory.
  // Worked out anew for each chunk: rows and columns take no registers from one to the next.
  const bool by_row = left.col_stride <= left.row_stride;
  const int row_step = by_row ? kThreads / T::kDepth : 0;
  const int depth_step = by_row ? 0 : kThreads / T::kRows;
  const auto for_each_own = [=](auto use) {
    const int thread = thread_index();
    int row = by_row ? thread / T::kDepth : thread % T::kRows;
    int depth = by_row ? thread % T::kDepth : thread / T::kRows;
#pragma unroll
    for (int i = 0; i < T::kLeft; ++i) {
      use(i, row, depth);
      row += row_step;
      depth += depth_step;
    }
  };
  S a[T::kLeft];
  const auto fetch = [&](int64_t first) {
    const int deep = end - first < T::kDepth ? static_cast<int>(end - first) : T::kDepth;
    for_each_own([&](int i, int row, int depth) {
      const bool inside = row < rows && depth < deep;
      a[i] = inside ? left((first_row + row) * left.row_stride + (first + depth) * left.col_stride)
                    : S{};
    });
  };

#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) tile.sum[i][j] = S{};
  }
  fetch(begin);
  right.prepare(begin, end, s.bits[0]);
  __syncthreads();
#pragma unroll 1
  for (int64_t first = begin; first < end; first += T::kDepth) {
    const int turn = static_cast<int>((first - begin) / T::kDepth % 2);
    for_each_own(
        [&](int i, int row, int depth) { s.left[depth][row / T::kOwn].row[row % T::kOwn] = a[i]; });
    const int thread = thread_index();
    const int column = thread % kSketch;
#pragma unroll 2
    for (int row = thread / kSketch; row < T::kDepth; row += kThreads / kSketch) {
      s.right[row][column] =
          column < width && first + row < end ? right(first + row, column, s.bits[turn][row]) : S{};
    }
    right.prepare(first + T::kDepth, end, s.bits[1 - turn]);
    __syncthreads();
    if (first + T::kDepth < end) fetch(first + T::kDepth);
#pragma unroll 2
    for (int k = 0; k < T::kDepth; ++k) {
      const typename T::Own own = s.left[k][thread / kGroup];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j * kGroup >= width) continue;
        const S other = s.right[k][thread % kGroup + j * kGroup];
#pragma unroll
        for (int i = 0; i < T::kOwn; ++i) add_product(tile.sum[i][j], own.row[i], other);
      }
    }
    __syncthreads();
  }
}

// Calls use(row, column, value) for what a thread has of a tile.
template <typename S, typename Use>
__device__ inline void for_each(const Tile<S>& tile, int rows, int width, Use use) {
  const int first_row = thread_down() * Tile<S>::kOwn, first_column = thread_across();
#pragma unroll
  for (int i = 0; i < Tile<S>::kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int row = first_row + i, column = first_column + j * kGroup;
      if (row < rows && column < width) use(row, column, tile.sum[i][j]);
    }
  }
}

}  // namespace tb::gpu
