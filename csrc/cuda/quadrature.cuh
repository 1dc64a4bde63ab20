// From the Jacobi matrices of Lanczos runs to alpha of every layer and its standard error, by a
// cooperative grid. The definition, with reasons: tbfast/backends/reference_slq.py.
//
//   1. Gauss rules of every run, one thread for each                       | grid barrier
//   2. each layer by one block, the largest first:
//        curves     cumulative mass of every run, one thread for each
//        pool       their mean on a common grid
//        spectrum   its quantiles: as many as the layer has eigenvalues that are not zero
//        fit        alpha, as of any spectrum
//        error      the same fit of smaller spectra: of all probes, of all but one (jackknife), and
//                   of half the steps (truncation); and what theory says of their scatter
#pragma once

#include "cuda/quadrature_pool.cuh"

namespace tb::gpu {

// The numbers are those of reference_slq.py, where they are explained.
constexpr double kZeroEps = 2;
constexpr int64_t kReplicate = 256;
constexpr double kPriorFreedom = 4;
constexpr double kChoice = 2.5;
constexpr double kSlopeWindow = 0.05;

// The largest Ritz value of a matrix.
__device__ inline double largest_node(const QuadratureArgs& a, int64_t matrix) {
  double top = 0;
  for (int64_t probe = 0; probe < a.probes; ++probe) {
    const Rule rule = rule_of(a, matrix * a.probes + probe, kFull);
    top = fmax(top, rule.nodes[rule.size - 1]);
  }
  return top;
}

// The curves of all runs of a layer and what they have in common.
//   rule: kFull, or kHalf for what half the steps would have given
__device__ inline Pool pool_of(const QuadratureArgs& a, const QuadratureLayer& layer, int rule) {
  for (int64_t run = layer.first * a.probes + threadIdx.x; run < layer.last * a.probes;
       run += kThreads) {
    const double floor = kZeroEps * a.eps * largest_node(a, run / a.probes);
    make_curve(a, run, rule_of(a, run, rule), rule_of(a, run, rule + 1), floor);
  }
  __syncthreads();
  return make_pool(a, layer);
}

// How many of `count` eigenvalues are zero; `total` is the share of the others.
__device__ inline int64_t zeros_of(double total, int64_t count) {
  const int64_t zeros = llround(static_cast<double>(count) * (1 - total));
  return total > 0 && zeros >= count ? count - 1 : zeros;
}

// T = 1 / (alpha - 1), the mean of ln(x / xmin) over the tail; 0 where there is no fit.
__device__ inline double excess_of(const Fit& fit) {
  return fit.reason == Reason::fitted ? 1 / (fit.alpha - 1) : 0;
}

// What theory says of the relative variance of T: over random start vectors, whose weights scatter
// by 2 / n (p of them), and of the spacing of the eigenvalues around xmin.
__device__ inline double scatter_of(const double* values, int64_t n, const Fit& fit, double p) {
  const auto size = static_cast<double>(n), tail = static_cast<double>(fit.n_tail);
  auto window = static_cast<int64_t>(kSlopeWindow * size);
  window = window > 1 ? window : 1;
  const int64_t low = fit.start > window ? fit.start - window : 0;
  const int64_t high = fit.start + window < n ? fit.start + window : n - 1;
  const double step =
      log(values[high] / values[low]) / static_cast<double>(high - low > 1 ? high - low : 1);
  const double t = excess_of(fit), slope = step * size;
  const double below = static_cast<double>(fit.start) / size;
  const double mean = t + slope * below;  // of the influence of a unit of mass on T
  double square = 0;
  for (int64_t i = fit.start + threadIdx.x; i < n; i += kThreads) {
    const double influence = log(values[i] / values[fit.start]) * size / tail;
    square += influence * influence / size;
  }
  square = slope * slope * below + block_sum(square);
  const double probes = 2 / (size * p) * fmax(0.0, square - mean * mean);
  return (kPriorFreedom * probes / (p - 1 + kPriorFreedom) + step * step) / (t * t);
}

// T of the fits of replicas of a spectrum, relative to that of the spectrum itself. The first is of
// all probes, then each is without one of them, the last is of half the steps.
struct Replicas {
  double truncation = 0;
  double mean = 0, squares = 0;  // of those without a probe, as Welford updates them

  __device__ void add(int64_t replica, bool half, double excess) {
    if (half || replica < 0) {
      truncation = excess - truncation;
    } else {
      const double off = excess - mean;
      mean += off / static_cast<double>(replica + 1);
      squares += off * (excess - mean);
    }
  }

  __device__ double variance(double p) const {
    const double jackknife = squares * (p - 1) / p;
    return (p - 1) * jackknife / (p - 1 + kPriorFreedom) + truncation * truncation;
  }
};

// What there is to know of a layer without a fit; `sum` is an estimate of its trace.
struct Extent {
  bool finite = true;
  double largest = 0, sum = 0;
};

__device__ inline Extent extent_of(const QuadratureArgs& a, const QuadratureLayer& layer) {
  Extent extent;
  for (int64_t matrix = layer.first + threadIdx.x; matrix < layer.last; matrix += kThreads) {
    double trace = 0;
    for (int64_t probe = 0; probe < a.probes; ++probe) {
      const int64_t run = matrix * a.probes + probe;
      const Rule rule = rule_of(a, run, kFull);
      extent.finite = extent.finite && is_finite(rule.nodes[rule.size - 1]);
      trace += a.diagonal[run * a.steps];
    }
    extent.largest = fmax(extent.largest, largest_node(a, matrix));
    extent.sum += static_cast<double>(a.count[matrix]) * trace / static_cast<double>(a.probes);
  }
  extent.finite = __syncthreads_and(extent.finite) != 0;
  extent.largest = block_max(extent.largest);
  extent.sum = block_sum(extent.sum);
  return extent;
}

// Writes a row of the results without the error.
__device__ inline void write_row(double* row, const Fit& fit, int64_t zeros, double largest,
                                 double sum) {
  if (threadIdx.x != 0) return;
  write_fit(fit, row);
  row[6] = static_cast<double>(zeros);
  row[7] = largest;
  row[8] = sum;
  row[9] = nan("");
}

// Fits a layer and its replicas and writes its row of the results.
__device__ inline void fit_layer(const QuadratureArgs& a, const QuadratureLayer& layer) {
  double* row = a.results + layer.layer * kQuadratureColumns;
  const Extent extent = extent_of(a, layer);
  if (!extent.finite) return write_row(row, unfitted(Reason::not_finite), 0, nan(""), nan(""));
  const auto p = static_cast<double>(a.probes);
  const int64_t last = a.probes > 1 ? a.probes : 0;
  Pool pool{};
  int64_t size = 0;
  double t = 0, scatter = 0;
  Replicas replicas;
  for (int64_t replica = -2; replica <= last; ++replica) {  // -2: the layer itself
    const bool whole = replica == -2, half = replica == last;
    if (whole || half) pool = pool_of(a, layer, half ? kHalf : kFull);
    if (whole) size = layer.count - zeros_of(pool.total(a.probes), layer.count);
    double* values = a.scratch + layer.spectrum;
    pool.spectrum(size, values, half ? -1 : replica);
    double* logs = values + (layer.count + 1);
    const Fit fit = block_fit(values, size, a.options, logs, logs + (layer.count + 1));
    if (!whole) {
      replicas.add(replica, half, excess_of(fit) / t);
      continue;
    }
    write_row(row, fit, layer.count - size, extent.largest, extent.sum);
    if (fit.reason != Reason::fitted) return;
    t = excess_of(fit);
    scatter = scatter_of(values, size, fit, p);
    // The tail is a number of eigenvalues, so it needs all of them.
    if (a.options.kind != FitKind::tail && size > kReplicate) size = kReplicate;
  }
  const bool chosen = a.options.kind == FitKind::ks || a.options.kind == FitKind::peak;
  const double error = (chosen ? kChoice : 1) / t * sqrt(replicas.variance(p) + scatter);
  if (threadIdx.x == 0) row[9] = error;
}

// All threads of a cooperative grid call it. Not inlined: its registers are its own.
__device__ __noinline__ inline void quadrature_phases(const QuadratureArgs& a) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < kRules * a.runs;
       i += stride) {
    make_rule(a, i % a.runs, static_cast<int>(i / a.runs));
  }
  grid_barrier();
  for (int64_t l = blockIdx.x; l < a.layer_count; l += gridDim.x) fit_layer(a, a.layers[l]);
}

}  // namespace tb::gpu
