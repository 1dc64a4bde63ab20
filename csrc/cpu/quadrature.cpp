// The definition, with the reasons: tbfast/backends/reference_slq.py.
#include "quadrature.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/parallel.h"

namespace tb {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The numbers are those of reference_slq.py, where they are explained.
constexpr double kZeroEps = 2;
constexpr double kIsolated = 20;
constexpr double kStillFalling = 0.5;
constexpr int kHalvings = 2;
constexpr int64_t kGrid = 1024;
constexpr int64_t kReplicate = 256;
constexpr double kPriorFreedom = 4;
constexpr double kChoice = 2.5;
constexpr double kSlopeWindow = 0.05;

using Values = std::vector<double>;

struct Rule {
  Values nodes, weights;

  Rule(const double* diagonal, const double* off_diagonal, int64_t size)
      : nodes(size), weights(size) {
    gauss_quadrature(diagonal, off_diagonal, size, nodes.data(), weights.data());
  }
};

// Cumulative mass over x = ln eigenvalue, piecewise linear through the points, `total` beyond the
// last, at which it jumps. Empty where all mass is zero.
struct Curve {
  Values x, mass;
  double total = 0;

  double at(double where, size_t& cursor) const {  // `cursor` rises with `where`
    if (x.empty() || where < x.front()) return 0;
    if (where > x.back()) return total;
    while (cursor + 1 < x.size() && x[cursor + 1] <= where) ++cursor;
    if (cursor + 1 == x.size()) return mass[cursor];
    const double share = (where - x[cursor]) / (x[cursor + 1] - x[cursor]);
    return mass[cursor] + share * (mass[cursor + 1] - mass[cursor]);
  }

  // Halves each interval: the mean of a linear mass and of a linear ln(total - mass).
  void halve() {
    Values finer_x, finer_mass;
    for (size_t j = 0; j < x.size(); ++j) {
      if (j > 0) {
        const double below = mass[j - 1], above = mass[j];
        const double tail = std::sqrt(std::max(0.0, total - below) * std::max(0.0, total - above));
        finer_x.push_back((x[j - 1] + x[j]) / 2);
        finer_mass.push_back(((below + above) / 2 + total - tail) / 2);
      }
      finer_x.push_back(x[j]);
      finer_mass.push_back(mass[j]);
    }
    x.swap(finer_x);
    mass.swap(finer_mass);
  }
};

// The curve of one run, numerical zeros left out.
Curve curve_of(const Rule& fine, const Rule& coarse, double floor) {
  Values nodes, weights;
  for (size_t j = 0; j < fine.nodes.size(); ++j) {
    const bool merged = !nodes.empty() && fine.nodes[j] <= floor;
    if (merged) {
      weights.back() += fine.weights[j];
    } else {
      nodes.push_back(std::max(fine.nodes[j], floor));
      weights.push_back(fine.weights[j]);
    }
  }
  Curve curve;
  if (!(nodes.back() > floor)) return curve;
  const bool sunk = nodes[0] <= floor;
  curve.total = 1;
  if (nodes.size() > 1 && nodes[1] > kIsolated * nodes[0] &&
      (sunk || nodes[0] < kStillFalling * coarse.nodes[0])) {
    const double lowest = weights[0];
    const double shed = sunk ? 0 : std::max(0.0, coarse.weights[0] - lowest);
    const double zeros = std::max(0.0, lowest - shed);
    curve.total = 1 - zeros;
    weights[0] = lowest - zeros;
    if (weights[0] > 1e-6 * lowest) {
      nodes[0] = std::min(nodes[0] * lowest / weights[0], std::sqrt(nodes[0] * nodes[1]));
    } else {
      nodes.erase(nodes.begin());
      weights.erase(weights.begin());
    }
  }
  const double first = std::log(nodes[0]);
  curve.x.push_back(nodes.size() > 1 ? first - (std::log(nodes[1]) - first) / 2 : first);
  curve.mass.push_back(0);
  double below = 0;
  for (size_t j = 0; j < nodes.size(); ++j) {
    curve.x.push_back(std::log(nodes[j]));
    curve.mass.push_back(below + weights[j] / 2);
    below += weights[j];
  }
  for (int i = 0; i < kHalvings; ++i) curve.halve();
  return curve;
}

// Mean cumulative mass of one layer on a grid, whole and by probe; the last point is the total.
class Pool {
 public:
  // curves: (matrices, probes)     shares: (matrices), which sum to 1
  Pool(const std::vector<Curve>& curves, const Values& shares, int64_t probes) : probes_(probes) {
    for (const Curve& curve : curves) x_.insert(x_.end(), curve.x.begin(), curve.x.end());
    std::sort(x_.begin(), x_.end());
    thin();
    if (x_.empty()) return;
    x_.push_back(x_.back());
    masses_.assign(probes, Values(x_.size()));
    for (size_t i = 0; i < curves.size(); ++i) {
      Values& mass = masses_[i % probes];
      const double share = shares[i / probes];
      size_t cursor = 0;
      for (size_t j = 0; j + 1 < x_.size(); ++j) mass[j] += share * curves[i].at(x_[j], cursor);
      mass.back() += share * curves[i].total;
    }
    sum_.resize(x_.size());
    for (const Values& mass : masses_) {
      for (size_t j = 0; j < x_.size(); ++j) sum_[j] += mass[j];
    }
  }

  // Share of the eigenvalues that are not zero.
  double total() const { return x_.empty() ? 0 : sum_.back() / static_cast<double>(probes_); }

  // The eigenvalues at the quantiles (i + 1/2) / n, of all probes or of all but one.
  void spectrum(int64_t n, Values& out, int64_t without = -1) const {
    if (x_.empty()) {  // nothing but zeros, as half a run may find
      out.insert(out.end(), n, 1.0);
      return;
    }
    Values mass = sum_;
    if (without >= 0) {
      for (size_t j = 0; j < mass.size(); ++j) mass[j] -= masses_[without][j];
    }
    for (size_t j = 1; j < mass.size(); ++j) mass[j] = std::max(mass[j], mass[j - 1]);
    size_t j = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double wanted = (static_cast<double>(i) + 0.5) / static_cast<double>(n) * mass.back();
      while (j + 1 < mass.size() && mass[j + 1] <= wanted) ++j;
      double x = x_[j];
      if (mass[j] <= wanted && j + 1 < mass.size()) {
        x += (wanted - mass[j]) / (mass[j + 1] - mass[j]) * (x_[j + 1] - x_[j]);
      }
      out.push_back(std::exp(x));
    }
  }

 private:
  void thin() {
    const auto size = static_cast<int64_t>(x_.size());
    if (size <= kGrid) return;
    for (int64_t i = 0; i < kGrid; ++i) x_[i] = x_[i * (size - 1) / (kGrid - 1)];
    x_.resize(kGrid);
  }

  int64_t probes_;
  Values x_, sum_;
  std::vector<Values> masses_;
};

// The curves of all runs of one layer at full length and at half, and what else they tell.
struct Layer {
  std::vector<Curve> full, half;
  Values shares;  // of each matrix in the eigenvalues
  int64_t count = 0;
  double largest = 0, sum = 0;
  bool finite = true;

  Layer(const Tridiagonals& runs, int64_t layer) {
    const int64_t begin = runs.first[layer], end = runs.first[layer + 1];
    for (int64_t m = begin; m < end; ++m) count += runs.count[m];
    for (int64_t m = begin; m < end && finite; ++m) add(runs, m);
  }

 private:
  void add(const Tridiagonals& runs, int64_t matrix) {
    std::vector<Rule> rules;  // by probe: full, half, quarter
    double top = 0, trace = 0;
    for (int64_t p = 0; p < runs.probes; ++p) {
      const int64_t run = matrix * runs.probes + p;
      const double* a = &runs.diagonal[run * runs.steps];
      const double* b = &runs.off_diagonal[run * runs.steps];
      const int64_t size = runs.taken[run];
      const auto bad = [](double v) { return !std::isfinite(v); };
      if (std::any_of(a, a + size, bad) || std::any_of(b, b + size - 1, bad)) {
        finite = false;
        return;
      }
      // A run that ended by itself knows all that its start vector can tell.
      const bool ended = size < runs.steps || size >= runs.count[matrix];
      const int64_t half = ended ? size : std::max<int64_t>(1, size / 2);
      rules.emplace_back(a, b, size);
      rules.emplace_back(a, b, half);
      rules.emplace_back(a, b, ended ? size : std::max<int64_t>(1, size / 4));
      top = std::max(top, rules[rules.size() - 3].nodes.back());
      trace += a[0];
    }
    const auto n = static_cast<double>(runs.count[matrix]);
    const double floor = kZeroEps * runs.eps[matrix] * top;
    for (size_t i = 0; i < rules.size(); i += 3) {
      full.push_back(curve_of(rules[i], rules[i + 1], floor));
      half.push_back(curve_of(rules[i + 1], rules[i + 2], floor));
    }
    largest = std::max(largest, top);
    sum += n * trace / static_cast<double>(runs.probes);
    shares.push_back(n / static_cast<double>(count));
  }
};

// T = 1 / (alpha - 1), the mean of ln(x / xmin) over the tail; 0 where there is no fit.
double excess(const Fit& fit) { return fit.reason == Reason::fitted ? 1 / (fit.alpha - 1) : 0; }

// Relative variance of T over random start vectors, whose weights scatter by 2 / n (p of them), and
// the spacing of the eigenvalues around xmin, squared, in units of T.
struct Scatter {
  double probes, spacing;

  Scatter(const double* values, int64_t n, const Fit& fit, int64_t p) {
    const auto size = static_cast<double>(n), tail = static_cast<double>(fit.n_tail);
    const auto window = std::max<int64_t>(1, static_cast<int64_t>(kSlopeWindow * size));
    const int64_t low = std::max<int64_t>(0, fit.start - window);
    const int64_t high = std::min(n - 1, fit.start + window);
    const double step = std::log(values[high] / values[low]) /
                        static_cast<double>(std::max<int64_t>(1, high - low));
    const double t = excess(fit), slope = step * size;
    const double below = static_cast<double>(fit.start) / size;
    const double mean = t + slope * below;  // of the influence of a unit of mass on T
    double square = slope * slope * below;
    for (int64_t i = fit.start; i < n; ++i) {
      const double influence = std::log(values[i] / values[fit.start]) * size / tail;
      square += influence * influence / size;
    }
    probes = 2 / (size * static_cast<double>(p)) * std::max(0.0, square - mean * mean) / (t * t);
    spacing = step * step / (t * t);
  }
};

double error_of(const Pool& full, const Pool& half, const Values& values, const Fit& fit,
                int64_t probes, const FitOptions& options) {
  const auto n = static_cast<int64_t>(values.size());
  // The tail is a number of eigenvalues, so it needs all of them.
  const int64_t size = options.kind == FitKind::tail ? n : std::min(n, kReplicate);
  Values replicas;
  full.spectrum(size, replicas);
  half.spectrum(size, replicas);
  for (int64_t p = 0; p < probes && probes > 1; ++p) full.spectrum(size, replicas, p);
  const auto rows = static_cast<int64_t>(replicas.size()) / size;
  std::vector<int64_t> offsets(rows + 1);
  for (int64_t i = 0; i <= rows; ++i) offsets[i] = i * size;
  const std::vector<Fit> fits = tb::fit(replicas.data(), offsets.data(), rows, options, 1);

  const double t = excess(fit);
  const double truncation = (excess(fits[1]) - excess(fits[0])) / t;
  double mean = 0, jackknife = 0;
  const auto p = static_cast<double>(probes);
  for (int64_t i = 2; i < rows; ++i) mean += excess(fits[i]) / p;
  for (int64_t i = 2; i < rows; ++i) jackknife += std::pow((excess(fits[i]) - mean) / t, 2);
  jackknife *= (p - 1) / p;
  const Scatter scatter(values.data(), n, fit, probes);
  const double between =
      ((p - 1) * jackknife + kPriorFreedom * scatter.probes) / (p - 1 + kPriorFreedom);
  const bool chosen = options.kind == FitKind::ks || options.kind == FitKind::peak;
  return (chosen ? kChoice : 1) * (fit.alpha - 1) *
         std::sqrt(between + truncation * truncation + scatter.spacing);
}

SketchFit fit_layer(const Tridiagonals& runs, int64_t index, const FitOptions& options) {
  const Layer layer(runs, index);
  if (!layer.finite) {
    return {{kNan, kNan, kNan, -1, 0, Reason::not_finite}, 0, kNan, kNan, kNan};
  }
  const Pool full(layer.full, layer.shares, runs.probes);
  const double total = full.total();
  int64_t n = 0;
  if (total > 0) {
    const auto zeros = std::llround(static_cast<double>(layer.count) * (1 - total));
    n = std::max<int64_t>(1, layer.count - zeros);
  }
  Values values;
  if (n > 0) full.spectrum(n, values);
  const int64_t offsets[] = {0, n};
  const Fit fit = tb::fit(values.data(), offsets, 1, options, 1).front();
  double error = kNan;
  if (fit.reason == Reason::fitted) {
    const Pool half(layer.half, layer.shares, runs.probes);
    error = error_of(full, half, values, fit, runs.probes, options);
  }
  return {fit, layer.count - n, layer.largest, layer.sum, error};
}

}  // namespace

std::vector<SketchFit> quadrature_fit(const Tridiagonals& runs, const FitOptions& options,
                                      int threads) {
  const auto layers = static_cast<int64_t>(runs.first.size()) - 1;
  std::vector<SketchFit> fits(layers);
  std::vector<int64_t> order(layers);
  std::iota(order.begin(), order.end(), 0);
  const auto matrices = [&](int64_t l) { return runs.first[l + 1] - runs.first[l]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return matrices(a) > matrices(b); });
  parallel_for(layers, threads,
               [&](int64_t i) { fits[order[i]] = fit_layer(runs, order[i], options); });
  return fits;
}

}  // namespace tb
