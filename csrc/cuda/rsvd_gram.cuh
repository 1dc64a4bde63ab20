// X^H X of a tall block in double precision: each work item adds up a strip of rows for one pair of
// blocks of kGramBlock columns; `factor` in rsvd_small.cuh adds up the strips. Only what is on and
// above the diagonal is computed.
#pragma once

#include "cuda/rsvd_tile.cuh"

namespace tb::gpu {

constexpr int kGramRows = 16;                  // that are in shared memory at a time
constexpr int kGramOwn = kGramBlock / kGroup;  // rows, and columns, of a thread

template <typename W>
struct GramShared {
  W left[kGramRows][kGramBlock], right[kGramRows][kGramBlock];
};

template <typename S>
__device__ inline void gram_item(const RsvdArgs& a, const RsvdEntry& e, RsvdItem item, int side,
                                 unsigned char* shared) {
  using W = WideOf<S>;
  auto& s = *reinterpret_cast<GramShared<W>*>(shared);
  const RsvdSide& block = e.side[side];
  const S* x = at<S>(a, block.block);
  const int columns = e.columns;
  const int first_left = item.part == 2 ? kGramBlock : 0;
  const int first_right = item.part == 0 ? 0 : kGramBlock;
  const int64_t begin = item.tile * block.strip_rows;
  const int64_t end =
      begin + block.strip_rows < block.length ? begin + block.strip_rows : block.length;

  const int down = thread_down(), across = thread_across();
  W sum[kGramOwn][kGramOwn] = {};
  for (int64_t first = begin; first < end; first += kGramRows) {
#pragma unroll 2
    for (int i = thread_index(); i < kGramRows * kGramBlock; i += kThreads) {
      const int row = i / kGramBlock, column = i % kGramBlock;
      const auto value = [&](int j) {
        const bool inside = first + row < end && j < columns;
        return inside ? widen(x[(first + row) * columns + j]) : W{};
      };
      s.left[row][column] = conjugate(value(first_left + column));
      s.right[row][column] = value(first_right + column);
    }
    __syncthreads();
#pragma unroll 1
    for (int row = 0; row < kGramRows; ++row) {
      W left[kGramOwn];
#pragma unroll
      for (int i = 0; i < kGramOwn; ++i) left[i] = s.left[row][down + i * kGroup];
#pragma unroll
      for (int j = 0; j < kGramOwn; ++j) {
        const W right = s.right[row][across + j * kGroup];
#pragma unroll
        for (int i = 0; i < kGramOwn; ++i) add_product(sum[i][j], left[i], right);
      }
    }
    __syncthreads();
  }
  W* out = at<W>(a, e.gram) + int64_t{item.tile} * columns * columns;
#pragma unroll
  for (int i = 0; i < kGramOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kGramOwn; ++j) {
      const int row = first_left + down + i * kGroup;
      const int column = first_right + across + j * kGroup;
      if (row <= column && column < columns) out[row * columns + column] = sum[i][j];
    }
  }
}

}  // namespace tb::gpu
