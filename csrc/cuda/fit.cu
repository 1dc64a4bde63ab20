#include "cuda/fit.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/quadrature.cuh"

namespace tb::gpu {
namespace {

struct FitArgs {
  const double* values;
  const int64_t* offsets;  // (rows + 1)
  const int64_t* order;    // (rows): spectra, the largest first
  int64_t rows;
  FitOptions options;
  double* logs;    // as values
  double* suffix;  // as values, and one more for each spectrum
  double* results;
};

__global__ void __launch_bounds__(kThreads, 2) fit_spectra(FitArgs a) {
  for (int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) {
    const int64_t row = a.order[i], begin = a.offsets[row], size = a.offsets[row + 1] - begin;
    const Fit fit =
        block_fit(a.values + begin, size, a.options, a.logs + begin, a.suffix + begin + row);
    if (threadIdx.x == 0) write_fit(fit, a.results + row * kFitColumns);
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    fit_quadratures(const __grid_constant__ QuadratureArgs a) {
  quadrature_phases(a);
}

// Blocks of a launch: those that were asked for, else as many as fit and have something to do.
template <typename Args>
int grid_size(void (*kernel)(Args), int64_t shared, int64_t blocks, int64_t items) {
  const int64_t resident = resident_blocks(kernel, shared);
  if (blocks == 0) blocks = std::min(resident, std::max<int64_t>(items, 1));
  if (blocks < 1 || blocks > resident) {
    throw std::invalid_argument("blocks must lie in 1 .. " + std::to_string(resident) +
                                ", which the device runs at once; got " + std::to_string(blocks));
  }
  return static_cast<int>(blocks);
}

template <typename T>
T* at(uintptr_t workspace, int64_t offset) {
  return reinterpret_cast<T*>(workspace + static_cast<uintptr_t>(offset));
}

}  // namespace

FitPlan::FitPlan(const std::vector<int64_t>& offsets, const FitOptions& options)
    : options_(options), rows_(static_cast<int64_t>(offsets.size()) - 1) {
  std::vector<int64_t> order(static_cast<size_t>(rows_));
  std::iota(order.begin(), order.end(), 0);
  const auto size = [&](int64_t row) {
    return offsets[static_cast<size_t>(row) + 1] - offsets[static_cast<size_t>(row)];
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return size(a) > size(b); });
  offsets_ = arena_.put(offsets);
  order_ = arena_.put(order);
  logs_ = arena_.take<double>(offsets.back());
  suffix_ = arena_.take<double>(offsets.back() + rows_);
}

void FitPlan::launch(uintptr_t values, uintptr_t workspace, uintptr_t results, uintptr_t stream,
                     int64_t blocks) const {
  if (rows_ == 0) return;
  FitArgs a{};
  a.values = reinterpret_cast<const double*>(values);
  a.offsets = at<const int64_t>(workspace, offsets_);
  a.order = at<const int64_t>(workspace, order_);
  a.rows = rows_;
  a.options = options_;
  a.logs = at<double>(workspace, logs_);
  a.suffix = at<double>(workspace, suffix_);
  a.results = reinterpret_cast<double*>(results);
  tb::gpu::launch(fit_spectra, grid_size(fit_spectra, 0, blocks, rows_), 0, a, stream);
}

QuadraturePlan::QuadraturePlan(const std::vector<int64_t>& first, const std::vector<int64_t>& count,
                               int64_t probes, int64_t steps, double eps, const FitOptions& options)
    : layout_(first, count, probes, steps, eps, options) {
  layout_.put_tables(arena_);
  layout_.take_scratch(arena_);
}

void QuadraturePlan::launch(uintptr_t diagonal, uintptr_t off_diagonal, uintptr_t taken,
                            uintptr_t workspace, uintptr_t results, uintptr_t stream,
                            int64_t blocks) const {
  if (layout_.layers() == 0) return;
  const QuadratureArgs a =
      layout_.args(workspace, reinterpret_cast<const double*>(diagonal),
                   reinterpret_cast<const double*>(off_diagonal),
                   reinterpret_cast<const int32_t*>(taken), reinterpret_cast<double*>(results));
  const int64_t rules = (kRules * a.runs + kThreads - 1) / kThreads;
  const int size =
      grid_size(fit_quadratures, kQuadratureShared, blocks, std::max(a.layer_count, rules));
  tb::gpu::launch(fit_quadratures, size, kQuadratureShared, a, stream);
}

}  // namespace tb::gpu
