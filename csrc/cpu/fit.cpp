// The four power-law fits. Definitions: tbfast/backends/reference.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace tb {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Below this many exponentials a fit is over before a thread has started.
constexpr double kWorthAThread = 2e5;

// A spectrum as logarithms relative to the largest: values in [-range, 0], so that sums of a
// narrow tail do not cancel.
struct Logs {
  std::vector<double> x;
  std::vector<double> suffix;  // suffix[i] = sum of x[j] over j >= i

  explicit Logs(const double* values, int64_t n) : x(n), suffix(n + 1) {
    const double top = std::log(values[n - 1]);
    for (int64_t i = 0; i < n; ++i) x[i] = std::log(values[i]) - top;
    for (int64_t i = n - 1; i >= 0; --i) suffix[i] = suffix[i + 1] + x[i];
  }

  int64_t size() const { return static_cast<int64_t>(x.size()); }

  // alpha = 1 + n / (sum_{j >= i} ln x_j - n ln x_i), n = N - i.
  double hill(int64_t start, double anchor) const {
    const double n = static_cast<double>(size() - start);
    const double excess = suffix[start] - n * anchor;
    return excess > 0 ? 1 + n / excess : kInfinity;
  }
  double hill(int64_t start) const { return hill(start, x[start]); }

  double distance(int64_t start, double alpha, double bound = kInfinity) const {
    return kernels().ks_distance(&x[start], size() - start, alpha, bound);
  }
};

struct Choice {
  int64_t start = -1;
  double alpha = kInfinity;
};

Choice median_choice(const Logs& logs, const FitOptions& options) {
  const int64_t n = logs.size();
  const auto start = static_cast<int64_t>(static_cast<double>(n) / options.xmin_pos);
  const auto half_width = static_cast<int64_t>(options.smooth * static_cast<double>(n));
  const int64_t first = std::max<int64_t>(0, start - half_width);
  const int64_t last = std::min(n, start + half_width + 1);
  const double anchor = std::accumulate(logs.x.begin() + first, logs.x.begin() + last, 0.0) /
                        static_cast<double>(last - first);
  return {start, logs.hill(start, anchor)};
}

// The candidate in [first, last) with the least distance, the first of equals. A coarse pass over
// every 16th candidate finds a bound that lets most of the others stop after a few blocks.
Choice best_candidate(const Logs& logs, int64_t first, int64_t last) {
  constexpr int64_t kStride = 16;
  const KsDistance ks_distance = kernels().ks_distance;
  const int64_t n = logs.size();
  Choice best;
  double least = 1.0;  // published: a candidate must do better than distance 1
  const auto consider = [&](int64_t i) {
    const double alpha = logs.hill(i);
    if (!(alpha > 1 && alpha < kInfinity)) return;
    const double d = ks_distance(&logs.x[i], n - i, alpha, least);
    if (d < least || (d == least && i < best.start)) {
      least = d;
      best = {i, alpha};
    }
  };
  for (int64_t i = first; i < last; i += kStride) consider(i);
  for (int64_t i = first; i < last; ++i) {
    if ((i - first) % kStride != 0) consider(i);
  }
  return best;
}

// Candidates within [0.95 p, 1.5 p], p the left edge of the fullest bin of the log10 histogram
// (bins as numpy.histogram makes them; the first of equals).
Choice peak_choice(const double* values, const Logs& logs, const FitOptions& options) {
  const int64_t n = logs.size();
  const double low = std::log10(values[0]);
  const double high = std::log10(values[n - 1]);
  if (!(high > low)) return {};
  const double width = (high - low) / static_cast<double>(options.bins);
  const auto edge = [&](int64_t bin) {
    return bin == options.bins ? high : low + static_cast<double>(bin) * width;
  };
  std::vector<int64_t> counts(options.bins);
  for (int64_t i = 0; i < n; ++i) {
    const double v = std::log10(values[i]);
    auto bin = static_cast<int64_t>((v - low) / (high - low) * static_cast<double>(options.bins));
    bin = std::min(bin, options.bins - 1);
    if (v < edge(bin)) --bin;
    if (bin < options.bins - 1 && v >= edge(bin + 1)) ++bin;
    ++counts[bin];
  }
  const auto fullest = std::max_element(counts.begin(), counts.end()) - counts.begin();
  const double peak = std::pow(10.0, edge(fullest));
  const double lower = options.peak_compat ? std::log10(0.95 * peak) : 0.95 * peak;
  const double* first = std::lower_bound(values, values + n - 1, lower);
  const double* last = std::upper_bound(first, values + n - 1, 1.5 * peak);
  return best_candidate(logs, first - values, last - values);
}

Fit unfitted(Reason reason) { return {kNan, kNan, kNan, -1, 0, reason}; }

Fit fit_one(const double* values, int64_t n, const FitOptions& options) {
  if (n == 0) return unfitted(Reason::no_eigenvalues);
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[i])) return unfitted(Reason::not_finite);
  }
  if (options.kind == FitKind::tail && options.k > n) return unfitted(Reason::too_few);
  const Logs logs(values, n);
  Choice choice;
  switch (options.kind) {
    case FitKind::median:
      choice = median_choice(logs, options);
      break;
    case FitKind::ks:
      choice = best_candidate(logs, 0, n - 1);
      break;
    case FitKind::peak:
      choice = peak_choice(values, logs, options);
      break;
    case FitKind::tail:
      choice = {n - options.k, logs.hill(n - options.k)};
      break;
  }
  if (choice.start < 0) return unfitted(Reason::no_candidate);
  if (!(choice.alpha <= options.max_alpha)) return unfitted(Reason::all_equal);
  return {choice.alpha, values[choice.start], logs.distance(choice.start, choice.alpha),
          choice.start, n - choice.start,     Reason::fitted};
}

}  // namespace

std::vector<Fit> fit(const double* values, const int64_t* offsets, int64_t rows,
                     const FitOptions& options, int threads) {
  std::vector<Fit> table(rows);
  std::vector<int64_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  const auto size = [&](int64_t row) { return offsets[row + 1] - offsets[row]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return size(a) > size(b); });
  double work = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const auto n = static_cast<double>(size(row));
    work += options.kind == FitKind::ks ? n * n / 2 : n;
  }
  parallel_for(rows, work < kWorthAThread ? 1 : threads, [&](int64_t i) {
    const int64_t row = order[i];
    table[row] = fit_one(values + offsets[row], size(row), options);
  });
  return table;
}

}  // namespace tb
