// One CholeskyQR of a block, as far as its small matrices go: the work of one block of threads.
//
//   G = sum of the strips of X^H X
//   G = R^H R, and the inverse of R^H beside it: both are eliminated in the same sweep, R on and
//       above the diagonal of one array and R^-H below it
//   the block is to be multiplied by R^-1, and R joins the product of all such R
//
// Pivots below rounding are raised to it, and the directions noted: these have vanished, and random
// ones take their place. Which ones, and when it is done, is as in csrc/cpu/rsvd.cpp.
#pragma once

#include "cuda/rsvd_tile.cuh"

namespace tb::gpu {

constexpr double kPivotFloor = 128 * std::numeric_limits<double>::epsilon();
constexpr int kPasses = 20;  // of CholeskyQR; two are usual, four where directions vanish
constexpr int64_t kSmallBytes = 48 << 10;  // of shared memory for small matrices

// A direction 1e-7 as long as the longest is rounding noise in float; in double one more look, or
// two, at what is left of it brings it out.
template <typename S>
constexpr int kLooks = sizeof(RealOf<S>) == 8 ? 2 : 0;

// Room for `count` small matrices: shared memory if they fit.
template <typename W>
__device__ inline W* small_matrices(const RsvdArgs& a, const RsvdEntry& e, int count,
                                    unsigned char* shared) {
  const int64_t bytes = int64_t{count} * e.columns * e.columns * static_cast<int64_t>(sizeof(W));
  return bytes <= kSmallBytes ? reinterpret_cast<W*>(shared) : at<W>(a, e.scratch);
}

// G, with zeros below its diagonal.
template <typename W>
__device__ void sum_strips(const W* strips, int count, int n, W* g) {
  for (int i = thread_index(); i < n * n; i += kThreads) {
    W sum{};
    if (i / n <= i % n) {
      for (int strip = 0; strip < count; ++strip) sum = sum + strips[int64_t{strip} * n * n + i];
    }
    g[i] = sum;
  }
  __syncthreads();
}

// Turns G into U and L^-1 of G = L U with a unit L: U on and above the diagonal, L^-1 below. Then R
// has the rows of U divided by the roots of their pivots, and R^-H those of L^-1.
template <typename W>
__device__ void eliminate(W* g, int n, double floor) {
  for (int j = 0; j < n; ++j) {
    const W* pivot_row = g + j * n;
    const double pivot = real(pivot_row[j]) < floor ? floor : real(pivot_row[j]);
    for (int i = j + 1 + warp(); i < n; i += kWarps) {
      const W factor = conjugate(pivot_row[i]) / pivot;
      W* row = g + i * n;
      for (int c = lane(); c < n; c += kLanes) {
        if (c == j) {
          row[c] = row[c] - factor;
        } else if (c < j || c >= i) {
          row[c] = row[c] - factor * pivot_row[c];
        }
      }
    }
    __syncthreads();
  }
}

// One pass; leaves in the state whether it is the last one.
template <typename S>
__device__ inline void factor(const RsvdArgs& a, const RsvdEntry& e, RsvdState& state, int side,
                              int pass, double condition, unsigned char* shared) {
  using W = WideOf<S>;
  const int n = e.columns;
  const RsvdSide& block = e.side[side];
  W* g = small_matrices<W>(a, e, 1, shared);
  sum_strips(at<W>(a, e.gram), block.strips, n, g);
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = fmax(largest, real(g[i * n + i]));
  __syncthreads();
  const double floor = largest > 0 ? kPivotFloor * largest : 1;
  eliminate(g, n, floor);

  const auto pivot = [&](int i) { return fmax(real(g[i * n + i]), floor); };
  double smallest = kInfinite;
  bool any_low = false;
  for (int i = 0; i < n; ++i) {
    const double found = real(g[i * n + i]);
    smallest = fmin(smallest, found);
    any_low = any_low || found < floor;
  }
  const bool done = !any_low && largest <= condition * condition * smallest;
  const bool looks_again = pass < kLooks<S> && largest > 0;
  const bool fills = any_low && !looks_again;

  S* multiplier = at<S>(a, block.multiplier);
  W* total = at<W>(a, e.total) + (pass + 1) % 2 * n * n;
  const W* before = at<W>(a, e.total) + pass % 2 * n * n;
#pragma unroll 1
  for (int i = thread_index(); i < n * n; i += kThreads) {
    const int row = i / n, column = i % n;
    const double root = sqrt(pivot(row));
    W inverse{}, sum{};
    if (row == column) inverse = from_parts<W>(1 / root, 0);
    if (row < column) inverse = conjugate(g[column * n + row]) / sqrt(pivot(column));
    multiplier[i] = narrow<S>(inverse);
    if (row <= column && !(fills && real(g[row * n + row]) < floor)) {
      const W diagonal = from_parts<W>(root, 0);
      if (pass == 0) {
        sum = row == column ? diagonal : g[i] / root;
      } else {
        sum = diagonal * before[i];
#pragma unroll 1
        for (int t = row + 1; t <= column; ++t) {
          sum = sum + g[row * n + t] / root * before[t * n + column];
        }
      }
    }
    total[i] = sum;
  }
  auto* low = at<int32_t>(a, e.low);
  for (int i = thread_index(); i < n; i += kThreads) {
    low[i] = fills && real(g[i * n + i]) < floor ? 1 : 0;
  }
  __syncthreads();
  if (thread_index() != 0) return;
  state.total = (pass + 1) % 2;
  state.passes = done ? 2 : 1;
}

}  // namespace tb::gpu
