#include "cpu/schedule.h"

#include <algorithm>
#include <numeric>

#include "cpu/parallel.h"

namespace tb {
namespace {

// Shares of the threads may differ by this factor, and an entry count that is worth splitting.
constexpr double kUneven = 1.1, kWorthSharing = 1 << 21;

// Which matrices are so large that all threads should work on each of them in turn: taken out,
// largest first, until what is left divides evenly enough over the threads. Costs fall.
size_t shared_ones(const std::vector<double>& costs, int threads) {
  double total = std::accumulate(costs.begin(), costs.end(), 0.0);
  for (size_t shared = 0; shared < costs.size(); ++shared) {
    if (costs[shared] < kWorthSharing) return shared;
    std::vector<double> load(static_cast<size_t>(threads), 0.0);
    for (size_t i = shared; i < costs.size(); ++i) {
      *std::min_element(load.begin(), load.end()) += costs[i];
    }
    if (*std::max_element(load.begin(), load.end()) * threads <= kUneven * total) return shared;
    total -= costs[shared];
  }
  return costs.size();
}

}  // namespace

void for_each_matrix(const std::vector<Matrix>& matrices, int threads,
                     const std::function<void(int64_t, int)>& task) {
  const auto cost = [&](int64_t i) {
    const Matrix& m = matrices[static_cast<size_t>(i)];
    return static_cast<double>(m.rows) * static_cast<double>(m.cols) *
           (is_complex(m.dtype) ? 4 : 1);
  };
  std::vector<int64_t> order(matrices.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  std::vector<double> costs;
  for (int64_t i : order) costs.push_back(cost(i));
  const size_t shared = threads > 1 ? shared_ones(costs, threads) : 0;
  for (size_t i = 0; i < shared; ++i) task(order[i], threads);
  parallel_for(static_cast<int64_t>(order.size() - shared), threads,
               [&](int64_t i) { task(order[shared + static_cast<size_t>(i)], 1); });
}

}  // namespace tb
