// Sums and scans over a warp or a block, in an order that depends on nothing but the indices.
// Every thread of the block must call the block's functions.
#pragma once

#include "cuda/device.h"

namespace tb::gpu {

__device__ inline bool is_finite(double v) { return v - v == 0; }

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kLanes; }

// The sum over a warp, on every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, apart);
  }
  return value;
}

template <typename T>
__device__ inline T warp_max(T value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, apart);
    value = other > value ? other : value;
  }
  return value;
}

// The sum over the block, on every thread. Waits for the block before and after.
__device__ inline double block_sum(double value) {
  TB_SHARED(double, sums, [kWarps]);
  value = warp_sum(value);
  __syncthreads();
  if (lane_index() == 0) sums[warp_index()] = value;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

// The largest over the block, on every thread; NaN is left out unless all are.
__device__ inline double block_max(double value) {
  TB_SHARED(double, tops, [kWarps]);
  value = warp_max(value);
  __syncthreads();
  if (lane_index() == 0) tops[warp_index()] = value;
  __syncthreads();
  double top = tops[0];
  for (int w = 1; w < kWarps; ++w) top = tops[w] > top ? tops[w] : top;
  return top;
}

// The sum over the threads before this one.
__device__ inline double block_sum_before(double value) {
  TB_SHARED(double, totals, [kWarps]);
  double running = value;
  for (int apart = 1; apart < kLanes; apart *= 2) {
    const double below = __shfl_up_sync(kAllLanes, running, apart);
    if (lane_index() >= apart) running += below;
  }
  __syncthreads();
  if (lane_index() == kLanes - 1) totals[warp_index()] = running;
  __syncthreads();
  double before = running - value;
  double earlier = 0;
  for (int w = 0; w < warp_index(); ++w) earlier += totals[w];
  return earlier + before;
}

}  // namespace tb::gpu
