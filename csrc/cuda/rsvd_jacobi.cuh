// The singular value decomposition of a small matrix R = J S W^H by one block of threads: one-sided
// Jacobi (Hestenes 1958; de Rijk 1989 for keeping the longer row in front) in double precision.
//
//   until no two rows of R are far from orthogonal
//     for each round of a tournament, in which every row meets another one, warps rotate the pairs
//   what was done to the rows of R was done to those of a unit matrix beside it: J^H
//   S are the lengths of the rows, W^H the rows divided by them
//   rows that vanish give way to an orthonormal completion of the others
#pragma once

#include "cuda/rsvd_small.cuh"

namespace tb::gpu {

constexpr int kSweeps = 60;           // five or six are usual
constexpr double kVanished = 1e-140;  // of the largest singular value: its square would underflow

// Squared singular values beyond this times the largest are too uncertain to be shifted by.
constexpr double kShifted = 1e-10;

// Largest cosine between two rows.
template <typename S>
constexpr double kCosine = sizeof(RealOf<S>) == 8 ? 1e-15 : 1e-8;

// Two numbers for each row, in shared memory.
__device__ inline double* row_numbers() {
  TB_SHARED(double, numbers, [2 * kSketch]);
  return numbers;
}

// Sum of x conj(y) over a row, on every lane of the warp.
__device__ inline double row_product(const double* x, const double* y, int n) {
  double sum = 0;
  for (int i = lane(); i < n; i += kLanes) sum += x[i] * y[i];
  return warp_sum(sum);
}
__device__ inline Complex<double> row_product(const Complex<double>* x, const Complex<double>* y,
                                              int n) {
  Complex<double> sum{};
  for (int i = lane(); i < n; i += kLanes) add_product(sum, x[i], conjugate(y[i]));
  return {warp_sum(sum.re), warp_sum(sum.im)};
}

template <typename W>
__device__ inline double row_square(const W* x, int n) {
  double sum = 0;
  for (int i = lane(); i < n; i += kLanes) sum += square(x[i]);
  return warp_sum(sum);
}

// (x, y) <- (c x - s phase y, s x + c phase y)
template <typename W>
__device__ inline void rotate(W* x, W* y, int n, double c, double s, W phase) {
  for (int i = lane(); i < n; i += kLanes) {
    const W turned = phase * y[i], kept = x[i];
    x[i] = kept * c - turned * s;
    y[i] = kept * s + turned * c;
  }
}

// Makes rows p < q of R orthogonal, and the longer one the first; false if they were.
template <typename W>
__device__ bool orthogonalise(W* rows, W* beside, int n, int p, int q, double tolerance) {
  W *x = rows + p * n, *y = rows + q * n;
  const double xx = row_square(x, n), yy = row_square(y, n);
  const W xy = row_product(x, y, n);
  if (square(xy) <= tolerance * tolerance * xx * yy) return false;
  const double product = sqrt(square(xy));
  const W phase = xy / product;  // makes the product real
  const double cotangent = (yy - xx) / (2 * product);
  const double root = sqrt(1 + cotangent * cotangent);
  const double tangent = 1 / (cotangent < 0 ? cotangent - root : cotangent + root);
  double c = 1 / sqrt(1 + tangent * tangent), s = c * tangent;
  if (xx - tangent * product < yy + tangent * product) {
    const double cosine = c;
    c = s;
    s = -cosine;
  }
  rotate(x, y, n, c, s, phase);
  if (beside != nullptr) rotate(beside + p * n, beside + q * n, n, c, s, phase);
  return true;
}

// Makes all rows orthogonal; whether that came to an end. Without `beside` only lengths are wanted.
template <typename W>
__device__ inline bool jacobi(W* rows, W* beside, int n, double tolerance) {
  const int players = (n + 1) / 2 * 2, others = players - 1;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < others; ++round) {
      for (int pair = warp(); pair < players / 2; pair += kWarps) {
        const int left = pair == 0 ? others : (round + pair) % others;
        const int right = (round - pair + others) % others;
        const int p = left < right ? left : right, q = left < right ? right : left;
        if (q < n && orthogonalise(rows, beside, n, p, q, tolerance)) rotated = true;
      }
      __syncthreads();
    }
    if (__syncthreads_or(rotated) == 0) return true;
  }
  return false;
}

// The square of the smallest singular value of R; 0 where it is not known, or too uncertain beside
// the largest.
template <typename S>
__device__ inline double smallest_square(const RsvdArgs& a, const RsvdEntry& e,
                                         const RsvdState& state, unsigned char* shared) {
  using W = WideOf<S>;
  const int n = e.columns;
  const W* r = at<W>(a, e.total) + state.total * n * n;
  W* rows = small_matrices<W>(a, e, 1, shared);
  double* squares = row_numbers();
  for (int i = thread_index(); i < n * n; i += kThreads) rows[i] = r[i];
  __syncthreads();
  const bool converged = jacobi<W>(rows, nullptr, n, kCosine<S>);
  for (int i = warp(); i < n; i += kWarps) {
    const double square = row_square(rows + i * n, n);
    if (lane() == 0) squares[i] = square;
  }
  __syncthreads();
  double low = squares[0], high = low;
  for (int i = 1; i < n; ++i) {
    low = fmin(low, squares[i]);
    high = fmax(high, squares[i]);
  }
  __syncthreads();
  return converged && low > kShifted * high ? low : 0;
}

// Replaces rows that vanished by an orthonormal completion of the others: the work of one warp.
template <typename W>
__device__ void complete(W* rows, const double* values, double floor, int n) {
  int candidate = 0;
  for (int p = 0; p < n; ++p) {
    if (values[p] > floor) continue;
    W* row = rows + p * n;
    double square = 0;
    // Of all unit vectors one at least keeps a 1 / n-th of its square: the others span the space.
    while (square < 0.5 / n) {
      for (int i = lane(); i < n; i += kLanes) {
        row[i] = from_parts<W>(i == candidate % n ? 1 : 0, 0);
      }
      ++candidate;
      for (int pass = 0; pass < 2; ++pass) {  // the second removes what rounding left
        for (int q = 0; q < n; ++q) {
          if (q == p || (q > p && !(values[q] > floor))) continue;
          const W part = row_product(row, rows + q * n, n);
          for (int i = lane(); i < n; i += kLanes) row[i] = row[i] - part * rows[q * n + i];
        }
      }
      square = row_square(row, n);
    }
    for (int i = lane(); i < n; i += kLanes) row[i] = row[i] / sqrt(square);
  }
}

// Leaves S, falling, and what Q and Z are to be multiplied by: W and J. Whether it converged.
template <typename S>
__device__ inline bool decompose(const RsvdArgs& a, const RsvdEntry& e, const RsvdState& state,
                                 unsigned char* shared) {
  using W = WideOf<S>;
  const int n = e.columns;
  const W* r = at<W>(a, e.total) + state.total * n * n;
  W* rows = small_matrices<W>(a, e, 2, shared);
  W* beside = rows + n * n;
  double* values = row_numbers();
  double* lengths = values + kSketch;  // of rows of `beside`: rounding makes them grow
  for (int i = thread_index(); i < n * n; i += kThreads) {
    rows[i] = r[i];
    beside[i] = from_parts<W>(i / n == i % n ? 1 : 0, 0);
  }
  __syncthreads();
  const bool converged = jacobi(rows, beside, n, kCosine<S>);
  for (int i = warp(); i < n; i += kWarps) {
    const double found = row_square(rows + i * n, n), length = row_square(beside + i * n, n);
    if (lane() != 0) continue;
    values[i] = sqrt(found);
    lengths[i] = sqrt(length);
  }
  __syncthreads();
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = fmax(largest, values[i]);
  const double floor = kVanished * largest;
  for (int i = warp(); i < n; i += kWarps) {
    if (!(values[i] > floor)) continue;
    for (int j = lane(); j < n; j += kLanes) rows[i * n + j] = rows[i * n + j] / values[i];
  }
  __syncthreads();
  if (warp() == 0) complete(rows, values, floor, n);
  __syncthreads();
  auto* sorted = at<double>(a, e.values);
  S *right = at<S>(a, e.side[0].multiplier), *left = at<S>(a, e.side[1].multiplier);
  for (int i = warp(); i < n; i += kWarps) {
    int place = 0;
    for (int other = 0; other < n; ++other) {
      place += values[other] > values[i] || (values[other] == values[i] && other < i) ? 1 : 0;
    }
    for (int j = lane(); j < n; j += kLanes) {
      right[j * n + place] = narrow<S>(conjugate(rows[i * n + j]));
      left[j * n + place] = narrow<S>(conjugate(beside[i * n + j]) / lengths[i]);
    }
    if (lane() == 0) sorted[place] = static_cast<RealOf<S>>(values[i]);
  }
  __syncthreads();
  return converged;
}

}  // namespace tb::gpu
