// Of one layer, by one block: the mean of the curves of all its runs on a common grid, whole and by
// probe, and spectra of its quantiles. With reasons: tbfast/backends/reference_slq.py.
//
//   grid    the points of all curves, sorted (a bitonic sort, whose steps between near places are
//           done in shared memory) and thinned out
//   sums    in the order of matrices, then probes
#pragma once

#include "cuda/quadrature_curve.cuh"

namespace tb::gpu {

// Sorts `size` numbers, a power of two, ascending.
__device__ inline void block_sort(double* x, int64_t size) {
  constexpr int64_t kChunk = kQuadratureShared / static_cast<int64_t>(sizeof(double));
  TB_DYNAMIC_SHARED(double, chunk);
  const auto order = [](double* part, int64_t pair, int64_t apart, int64_t begin, int64_t width) {
    const int64_t i = pair + (pair & ~(apart - 1));
    const double low = part[i], high = part[i + apart];
    if ((low > high) != (((begin + i) & width) == 0)) return;
    part[i] = high;
    part[i + apart] = low;
  };
  for (int64_t width = 2; width <= size; width *= 2) {
    int64_t apart = width / 2;
    for (; apart >= kChunk; apart /= 2) {
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        order(x, pair, apart, 0, width);
      }
      __syncthreads();
    }
    const int64_t count = size < kChunk ? size : kChunk;
    for (int64_t begin = 0; begin < size; begin += count) {
      for (int64_t i = threadIdx.x; i < count; i += kThreads) chunk[i] = x[begin + i];
      __syncthreads();
      for (int64_t near = apart; near > 0; near /= 2) {
        for (int64_t pair = threadIdx.x; pair < count / 2; pair += kThreads) {
          order(chunk, pair, near, begin, width);
        }
        __syncthreads();
      }
      for (int64_t i = threadIdx.x; i < count; i += kThreads) x[begin + i] = chunk[i];
      __syncthreads();
    }
  }
}

// Makes each number the largest up to there.
__device__ inline void block_running_max(double* x, int64_t size) {
  TB_SHARED(double, tops, [kWarps]);
  for (int64_t first = 0; first < size; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    double top = i < size ? x[i] : -HUGE_VAL;
    for (int apart = 1; apart < kLanes; apart *= 2) {
      const double below = __shfl_up_sync(kAllLanes, top, apart);
      if (lane_index() >= apart) top = fmax(top, below);
    }
    if (lane_index() == kLanes - 1) tops[warp_index()] = top;
    __syncthreads();
    for (int w = 0; w < warp_index(); ++w) top = fmax(top, tops[w]);
    if (first > 0) top = fmax(top, x[first - 1]);
    if (i < size) x[i] = top;
    __syncthreads();
  }
}

// Cumulative mass of a layer on a grid, whose last point repeats the one before: there the mass
// jumps to its total. Without points where all mass is zero.
struct Pool {
  double* x;  // the grid; what else there is follows it
  int64_t points;

  static constexpr int64_t kStride = kGridPoints + 1;
  __device__ double* sum() const { return x + kStride; }  // over probes
  __device__ double* running() const { return x + 2 * kStride; }
  __device__ double* masses(int64_t probe) const { return x + 3 * kStride + probe * points; }

  // Share of the eigenvalues that are not zero.
  __device__ double total(int64_t probes) const {
    return points == 0 ? 0 : sum()[points - 1] / static_cast<double>(probes);
  }

  // The eigenvalues at the quantiles (i + 1/2) / n, of all probes or of all but one.
  __device__ void spectrum(int64_t n, double* out, int64_t without = -1) const {
    if (points == 0) {  // nothing but zeros, as half a run may find
      for (int64_t i = threadIdx.x; i < n; i += kThreads) out[i] = 1;
      __syncthreads();
      return;
    }
    double* mass = running();
    for (int64_t j = threadIdx.x; j < points; j += kThreads) {
      mass[j] = without < 0 ? sum()[j] : sum()[j] - masses(without)[j];
    }
    __syncthreads();
    block_running_max(mass, points);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const double wanted =
          (static_cast<double>(i) + 0.5) / static_cast<double>(n) * mass[points - 1];
      const int64_t j = first_not(1, points, [&](int64_t k) { return mass[k] <= wanted; }) - 1;
      double place = x[j];
      if (mass[j] <= wanted && j + 1 < points) {
        place += (wanted - mass[j]) / (mass[j + 1] - mass[j]) * (x[j + 1] - x[j]);
      }
      out[i] = exp(place);
    }
    __syncthreads();
  }
};

// From the curves of a layer.
__device__ inline Pool make_pool(const QuadratureArgs& a, const QuadratureLayer& layer) {
  const int64_t first = layer.first * a.probes, last = layer.last * a.probes;
  const int64_t width = curve_width(a.steps);
  double* sorted = a.scratch + layer.sorted;
  double counted = 0;
  for (int64_t i = threadIdx.x; i < layer.sorted_size; i += kThreads) {
    const int64_t run = first + i / width;
    const bool point = run < last && i % width < a.points[run];
    sorted[i] = point ? a.x[first * width + i] : HUGE_VAL;
    counted += point ? 1 : 0;
  }
  const auto count = static_cast<int64_t>(block_sum(counted));
  block_sort(sorted, layer.sorted_size);

  const int64_t kept = count < kGridPoints ? count : kGridPoints;
  const Pool pool{a.scratch + layer.pool, kept == 0 ? 0 : kept + 1};
  for (int64_t j = threadIdx.x; j < pool.points; j += kThreads) {
    const int64_t i = j < kept ? j : kept - 1;
    pool.x[j] = sorted[count > kGridPoints ? i * (count - 1) / (kGridPoints - 1) : i];
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < pool.points * a.probes; i += kThreads) {
    const int64_t probe = i / pool.points, j = i % pool.points;
    double mass = 0;
    for (int64_t matrix = layer.first; matrix < layer.last; ++matrix) {
      const double share = static_cast<double>(a.count[matrix]) / static_cast<double>(layer.count);
      const Curve curve = curve_of(a, matrix * a.probes + probe);
      mass += share * (j < kept ? curve.at(pool.x[j]) : curve.total);
    }
    pool.masses(probe)[j] = mass;
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < pool.points; j += kThreads) {
    double sum = 0;
    for (int64_t probe = 0; probe < a.probes; ++probe) sum += pool.masses(probe)[j];
    pool.sum()[j] = sum;
  }
  __syncthreads();
  return pool;
}

}  // namespace tb::gpu
