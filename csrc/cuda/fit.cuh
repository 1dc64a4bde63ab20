// Power-law fits of one spectrum, in double, by one block. The definitions are
// tbfast/backends/reference_fit.py, for values v_0 <= v_1 <= ...:
//
//   logs      x_i = ln v_i - ln v_{N-1}: relative to the largest, so that the sums of a narrow tail
//             do not cancel
//   suffix    s_i = x_i + x_{i+1} + ...: a scan by the block
//   hill      alpha_i = 1 + n / (s_i - n x_i), n = N - i
//   distance  d_i = max_j |1 - exp((1 - alpha_i) (x_j - x_i)) - (j - i) / n|, j >= i
//   ks, peak  the candidate i with the least d_i, the first of equals. A warp scores a candidate
//   and
//             leaves off where the distance exceeds a bound; every 16th candidate is scored first,
//             which makes the bound
//
// The bound decides how much is computed, not which candidate wins.
#pragma once

#include "cuda/block.h"
#include "kernels.h"

namespace tb::gpu {

// The first index in [first, last) for which `before` does not hold, by bisection; else `last`.
template <typename Before>
__device__ inline int64_t first_not(int64_t first, int64_t last, Before before) {
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (before(middle)) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

struct Choice {
  int64_t start;  // -1: none
  double alpha;
};

// The logarithms of a spectrum, in memory of the device.
struct Logs {
  double* x;
  double* suffix;  // one more than x: suffix[size] = 0
  int64_t size;

  __device__ double hill(int64_t start, double anchor) const {
    const auto n = static_cast<double>(size - start);
    const double excess = suffix[start] - n * anchor;
    return excess > 0 ? 1 + n / excess : HUGE_VAL;
  }
  __device__ double hill(int64_t start) const { return hill(start, x[start]); }

  // What place j of the tail adds to the distance.
  __device__ double gap(int64_t start, double alpha, int64_t j) const {
    const double model = 1 - exp((1 - alpha) * (x[start + j] - x[start]));
    return fabs(model - static_cast<double>(j) / static_cast<double>(size - start));
  }

  // For a warp: the distance, or any number above `bound` if it is above that.
  __device__ double warp_distance(int64_t start, double alpha, double bound) const {
    const int64_t n = size - start;
    const int lane = lane_index();
    if (n > 4 * kLanes) {  // A sample over the whole tail rules out most candidates.
      const double sampled = warp_max(gap(start, alpha, lane * (n / kLanes)));
      if (sampled > bound) return sampled;
    }
    double worst = 0;
    for (int64_t first = 0; first < n; first += kLanes) {
      const int64_t j = first + lane;
      if (j < n) worst = fmax(worst, gap(start, alpha, j));
      if (__any_sync(kAllLanes, worst > bound) != 0) break;
    }
    return warp_max(worst);
  }

  // For a block: the distance, on every thread.
  __device__ double distance(int64_t start, double alpha) const {
    double worst = 0;
    for (int64_t j = threadIdx.x; j < size - start; j += kThreads) {
      worst = fmax(worst, gap(start, alpha, j));
    }
    return block_max(worst);
  }
};

__device__ inline Logs block_logs(const double* values, int64_t n, double* x, double* suffix) {
  const double top = log(values[n - 1]);
  if (threadIdx.x == 0) suffix[n] = 0;
  for (int64_t last = n; last > 0; last -= kThreads) {  // from the end, kThreads at a time
    const int64_t i = last - 1 - threadIdx.x;
    const double value = i >= 0 ? log(values[i]) - top : 0;
    const double before = block_sum_before(value);
    if (i < 0) continue;
    x[i] = value;
    suffix[i] = suffix[last] + (before + value);
  }
  __syncthreads();
  return {x, suffix, n};
}

__device__ inline Choice median_choice(const Logs& logs, const FitOptions& options) {
  const int64_t n = logs.size;
  const auto start = static_cast<int64_t>(static_cast<double>(n) / options.xmin_pos);
  const auto half_width = static_cast<int64_t>(options.smooth * static_cast<double>(n));
  const int64_t first = start > half_width ? start - half_width : 0;
  const int64_t last = start + half_width + 1 < n ? start + half_width + 1 : n;
  double sum = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) sum += logs.x[i];
  return {start, logs.hill(start, block_sum(sum) / static_cast<double>(last - first))};
}

// Candidates that are scored, and the best so far.
struct Search {
  double least = 1;  // published: a candidate must do better than distance 1
  int64_t best = -1;

  __device__ void offer(double distance, int64_t i) {
    if (distance < least || (distance == least && i < best)) {
      least = distance;
      best = i;
    }
  }

  // For a warp.
  __device__ void score(const Logs& logs, int64_t i) {
    const double alpha = logs.hill(i);
    if (alpha > 1 && alpha < HUGE_VAL) offer(logs.warp_distance(i, alpha, least), i);
  }

  // The best of all warps, on every thread.
  __device__ void join() {
    TB_SHARED(double, least_of, [kWarps]);
    TB_SHARED(int64_t, best_of, [kWarps]);
    __syncthreads();
    if (lane_index() == 0) {
      least_of[warp_index()] = least;
      best_of[warp_index()] = best;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (best_of[w] >= 0) offer(least_of[w], best_of[w]);
    }
  }
};

// The candidate in [first, last) with the least distance, the first of equals.
__device__ inline Choice best_candidate(const Logs& logs, int64_t first, int64_t last) {
  constexpr int64_t kStride = 16;
  Search search;
  for (int64_t i = first + warp_index() * kStride; i < last; i += kWarps * kStride) {
    search.score(logs, i);
  }
  search.join();
  for (int64_t c = warp_index();; c += kWarps) {  // the c-th of those that were passed over
    const int64_t i = first + c / (kStride - 1) * kStride + c % (kStride - 1) + 1;
    if (i >= last) break;
    search.score(logs, i);
  }
  search.join();
  return {search.best, search.best < 0 ? HUGE_VAL : logs.hill(search.best)};
}

// The histogram of log10, as numpy.histogram makes it. A spectrum is sorted, so that a bin is a
// range of it.
struct Histogram {
  const double* values;
  int64_t n, bins;
  double low, high, width;

  __device__ double edge(int64_t bin) const {
    return bin == bins ? high : low + static_cast<double>(bin) * width;
  }

  __device__ int64_t bin_of(int64_t i) const {
    const double v = log10(values[i]);
    auto bin = static_cast<int64_t>((v - low) / (high - low) * static_cast<double>(bins));
    bin = bin < bins - 1 ? bin : bins - 1;
    if (v < edge(bin)) --bin;
    if (bin < bins - 1 && v >= edge(bin + 1)) ++bin;
    return bin;
  }

  // The first value of this bin or a later one.
  __device__ int64_t first_in(int64_t bin) const {
    return first_not(0, n, [&](int64_t i) { return bin_of(i) < bin; });
  }

  // For a block: the first of the fullest bins.
  __device__ int64_t fullest() const {
    double most = -1, where = 0;
    for (int64_t bin = threadIdx.x; bin < bins; bin += kThreads) {
      const auto count = static_cast<double>(first_in(bin + 1) - first_in(bin));
      if (count > most) {
        most = count;
        where = static_cast<double>(bin);
      }
    }
    const double top = block_max(most);
    return static_cast<int64_t>(-block_max(most == top ? -where : -HUGE_VAL));
  }
};

// Candidates within [0.95 p, 1.5 p], p the left edge of the fullest bin.
__device__ inline Choice peak_choice(const double* values, const Logs& logs,
                                     const FitOptions& options) {
  const int64_t n = logs.size;
  const double low = log10(values[0]), high = log10(values[n - 1]);
  if (!(high > low)) return {-1, HUGE_VAL};
  const Histogram histogram{values, n,    options.bins,
                            low,    high, (high - low) / static_cast<double>(options.bins)};
  const double peak = exp10(histogram.edge(histogram.fullest()));
  const double lower = options.peak_compat ? log10(0.95 * peak) : 0.95 * peak;
  const int64_t first = first_not(0, n - 1, [&](int64_t i) { return values[i] < lower; });
  const int64_t last = first_not(first, n - 1, [&](int64_t i) { return values[i] <= 1.5 * peak; });
  return best_candidate(logs, first, last);
}

__device__ inline Fit unfitted(Reason reason) {
  const double none = nan("");
  return {none, none, none, -1, 0, reason};
}

// Fits a spectrum, on every thread. All threads of the block call it; they see `values` already,
// and may overwrite everything afterwards.
//   values: n, ascending and positive (NaN and infinity are found)     logs: n     suffix: n + 1
__device__ inline Fit block_fit(const double* values, int64_t n, const FitOptions& options,
                                double* logs, double* suffix) {
  if (n == 0) return unfitted(Reason::no_eigenvalues);
  bool finite = true;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) finite = finite && is_finite(values[i]);
  if (__syncthreads_and(finite) == 0) return unfitted(Reason::not_finite);
  if (options.kind == FitKind::tail && options.k > n) return unfitted(Reason::too_few);
  const Logs found = block_logs(values, n, logs, suffix);
  Choice choice{-1, HUGE_VAL};
  switch (options.kind) {
    case FitKind::median:
      choice = median_choice(found, options);
      break;
    case FitKind::ks:
      choice = best_candidate(found, 0, n - 1);
      break;
    case FitKind::peak:
      choice = peak_choice(values, found, options);
      break;
    case FitKind::tail:
      choice = {n - options.k, found.hill(n - options.k)};
      break;
  }
  Fit fit = unfitted(Reason::no_candidate);
  if (choice.start >= 0) {
    fit = unfitted(Reason::all_equal);
    if (choice.alpha <= options.max_alpha) {
      fit = {choice.alpha, values[choice.start], found.distance(choice.start, choice.alpha),
             choice.start, n - choice.start,     Reason::fitted};
    }
  }
  __syncthreads();
  return fit;
}

// The columns of results that every fit has.
constexpr int64_t kFitColumns = 6;

__device__ inline void write_fit(const Fit& fit, double* row) {
  row[0] = fit.alpha;
  row[1] = fit.xmin;
  row[2] = fit.ks;
  row[3] = static_cast<double>(fit.start);
  row[4] = static_cast<double>(fit.n_tail);
  row[5] = static_cast<double>(fit.reason);
}

}  // namespace tb::gpu
