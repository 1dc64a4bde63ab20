#include <algorithm>

#include "cuda/quadrature.h"

namespace tb::gpu {

QuadratureLayout::QuadratureLayout(const std::vector<int64_t>& first,
                                   const std::vector<int64_t>& count, int64_t probes, int64_t steps,
                                   double eps, const FitOptions& options)
    : count_(count), probes_(probes), steps_(steps), eps_(eps), options_(options) {
  for (size_t l = 0; l + 1 < first.size(); ++l) {
    QuadratureLayer layer{};
    layer.layer = static_cast<int64_t>(l);
    layer.first = first[l];
    layer.last = first[l + 1];
    for (int64_t m = layer.first; m < layer.last; ++m) layer.count += count[static_cast<size_t>(m)];
    const auto take = [&](int64_t size) {
      doubles_ += size;
      return doubles_ - size;
    };
    const int64_t points = (layer.last - layer.first) * probes * curve_width(steps);
    layer.sorted_size = 1;
    while (layer.sorted_size < points) layer.sorted_size *= 2;
    layer.sorted = take(layer.sorted_size);
    layer.pool = take((probes + 3) * (kGridPoints + 1));
    layer.spectrum = take(3 * (layer.count + 1));
    layers_.push_back(layer);
  }
  const auto size = [](const QuadratureLayer& l) { return l.last - l.first; };
  std::stable_sort(layers_.begin(), layers_.end(),
                   [&](const QuadratureLayer& a, const QuadratureLayer& b) {
                     return size(a) != size(b) ? size(a) > size(b) : a.count > b.count;
                   });
}

void QuadratureLayout::put_tables(Arena& arena) {
  layers_at_ = arena.put(layers_);
  count_at_ = arena.put(count_);
}

void QuadratureLayout::take_scratch(Arena& arena) {
  const int64_t runs = static_cast<int64_t>(count_.size()) * probes_;
  nodes_ = arena.take<double>(3 * runs * steps_);
  weights_ = arena.take<double>(3 * runs * steps_);
  coupled_ = arena.take<double>(3 * runs * steps_);
  x_ = arena.take<double>(runs * curve_width(steps_));
  mass_ = arena.take<double>(runs * curve_width(steps_));
  totals_ = arena.take<double>(runs);
  points_ = arena.take<int64_t>(runs);
  scratch_ = arena.take<double>(doubles_);
}

QuadratureArgs QuadratureLayout::args(uintptr_t workspace, const double* diagonal,
                                      const double* off_diagonal, const int32_t* taken,
                                      double* results) const {
  const auto doubles = [&](int64_t offset) {
    return reinterpret_cast<double*>(workspace + static_cast<uintptr_t>(offset));
  };
  QuadratureArgs a{};
  a.diagonal = diagonal;
  a.off_diagonal = off_diagonal;
  a.taken = taken;
  a.count = reinterpret_cast<const int64_t*>(workspace + static_cast<uintptr_t>(count_at_));
  a.layers =
      reinterpret_cast<const QuadratureLayer*>(workspace + static_cast<uintptr_t>(layers_at_));
  a.layer_count = layers();
  a.runs = static_cast<int64_t>(count_.size()) * probes_;
  a.probes = probes_;
  a.steps = steps_;
  a.eps = eps_;
  a.options = options_;
  a.nodes = doubles(nodes_);
  a.weights = doubles(weights_);
  a.coupled = doubles(coupled_);
  a.x = doubles(x_);
  a.mass = doubles(mass_);
  a.totals = doubles(totals_);
  a.points = reinterpret_cast<int64_t*>(workspace + static_cast<uintptr_t>(points_));
  a.scratch = doubles(scratch_);
  a.results = results;
  return a;
}

}  // namespace tb::gpu
