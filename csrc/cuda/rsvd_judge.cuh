// What one block decides about a matrix from sums that others have left: whether it is finite and
// must be scaled, the shift of a power step, and in the end all that is known from S.
#pragma once

#include "cuda/rsvd_grid.cuh"
#include "cuda/rsvd_jacobi.cuh"

namespace tb::gpu {

// |A|^2 for which no square and no product can overflow or vanish, in float or double.
constexpr double kSafeFrom = 1e-40, kSafeTo = 1e40;
// Times eps * |A|^2: a squared residual below it has cancelled too far to be a difference of sums.
constexpr double kCancelled = 100;

template <typename S>
constexpr double kEps = std::numeric_limits<RealOf<S>>::epsilon();

// A power of two that brings the largest entry near 1 and that the scalars can hold.
__device__ inline double scale_for(double largest, DType dtype) {
  const bool wide = dtype == DType::f64 || dtype == DType::c128;
  const int most = (wide ? 1024 : 128) - 8;
  int exponent;
  frexp(largest, &exponent);
  return ldexp(1.0, exponent < -most ? most : (exponent > most ? -most : -exponent));
}

// From |A|^2 and the largest entry, as left by the product with the signs, for the first time or
// with a scaled A.
__device__ inline void judge(const RsvdArgs& a, int32_t matrix, const RsvdEntry& e,
                             RsvdState& state, bool first) {
  const auto* sums = at<double>(a, e.sums);
  double square = 0, top = 0;
  for (int64_t i = thread_index(); i < int64_t{e.side[0].tiles} * e.side[0].slices; i += kThreads) {
    square += sums[2 * i];
    top = fmax(top, sums[2 * i + 1]);
  }
  square = block_sum(square);
  top = block_max(top);
  if (thread_index() != 0) return;
  state.square = square;
  if (!first) return;
  state.alive = 1;
  state.scale = 1;
  state.shift = 0;
  state.rescaled = state.passes = state.cancelled = 0;
  if (!(top < kInfinite)) return give_up(a, matrix, state, nan(""), 1);
  if ((square >= kSafeFrom && square <= kSafeTo) || top == 0) return;
  state.rescaled = 1;
  state.scale = scale_for(top, e.dtype);
}

// The shift of a power step with `step` of them to go, from the smallest singular value that Q
// sees.
template <typename S>
__device__ inline void find_shift(const RsvdArgs& a, const RsvdEntry& e, RsvdState& state, int step,
                                  unsigned char* shared) {
  const double low = smallest_square<S>(a, e, state, shared);
  if (thread_index() == 0) state.shift = a.shifts[step - 1] * low;
}

// S itself, alpha of the tail of its squares (Hill 1975), and the residual, unless it is too small
// for a difference of sums.
template <typename S>
__device__ inline void conclude(const RsvdArgs& a, int32_t matrix, const RsvdEntry& e,
                                RsvdState& state, unsigned char* shared) {
  if (!decompose<S>(a, e, state, shared)) {
    if (thread_index() == 0) give_up(a, matrix, state, kInfinite, 0);
    return;
  }
  const auto* values = at<double>(a, e.values);
  auto* s = reinterpret_cast<double*>(a.factors + e.out[1]);
  const double last = values[a.rank - 1];
  double squares = 0, excess = 0;
  for (int64_t p = thread_index(); p < a.rank; p += kThreads) {
    s[p] = values[p] / state.scale;
    squares += values[p] * values[p];
    excess += 2 * log(values[p] / last);
  }
  squares = block_sum(squares);
  excess = block_sum(excess);
  if (thread_index() != 0) return;
  const double left = state.square - squares;
  state.cancelled = left < kCancelled * kEps<S> * state.square ? 1 : 0;
  double* result = a.results + matrix * kRsvdResults;
  result[0] = state.square > 0 ? sqrt(left / state.square) : 0;
  result[1] = last > 0 && excess > 0 ? 1 + static_cast<double>(a.rank) / excess : nan("");
  const int iterations = e.iterates != 0 ? a.iterations : 0;
  result[2] = 2 + state.rescaled + 2 * iterations + state.cancelled;
}

}  // namespace tb::gpu
