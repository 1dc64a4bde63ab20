// The curve of one Lanczos run: cumulative mass over x = ln eigenvalue, numerical zeros left out;
// one thread makes one curve. With reasons: tbfast/backends/reference_slq.py.
#pragma once

#include "cuda/fit.cuh"
#include "cuda/gauss_rule.cuh"

namespace tb::gpu {

// The numbers are those of reference_slq.py, where they are explained.
constexpr double kIsolated = 20;
constexpr double kStillFalling = 0.5;

// Piecewise linear through the points, `total` beyond the last, at which it jumps. Without points
// where all mass is zero.
struct Curve {
  double* x;
  double* mass;
  int64_t points;
  double total;

  __device__ double at(double where) const {
    if (points == 0 || where < x[0]) return 0;
    if (where > x[points - 1]) return total;
    const int64_t j = first_not(1, points, [&](int64_t i) { return x[i] <= where; }) - 1;
    if (j + 1 == points) return mass[j];
    const double share = (where - x[j]) / (x[j + 1] - x[j]);
    return mass[j] + share * (mass[j + 1] - mass[j]);
  }

  // Cuts each interval, `apart` points long, in two, at the mean of a linear mass and of a linear
  // ln(total - mass).
  __device__ void halve(int64_t apart) const {
    for (int64_t i = 0; i + apart < points; i += apart) {
      const double below = mass[i], above = mass[i + apart];
      const double tail = sqrt(fmax(0.0, total - below) * fmax(0.0, total - above));
      x[i + apart / 2] = (x[i] + x[i + apart]) / 2;
      mass[i + apart / 2] = ((below + above) / 2 + total - tail) / 2;
    }
  }
};

__device__ inline Curve curve_of(const QuadratureArgs& a, int64_t run) {
  const int64_t place = run * curve_width(a.steps);
  return {a.x + place, a.mass + place, a.points[run], a.totals[run]};
}

// Makes the curve of a run.
//   fine, coarse: rules of all its steps and of half of them     floor: nodes up to it are zeros
__device__ inline void make_curve(const QuadratureArgs& a, int64_t run, const Rule& fine,
                                  const Rule& coarse, double floor) {
  Curve curve = curve_of(a, run);
  a.points[run] = 0;
  a.totals[run] = 0;
  if (!(fine.nodes[fine.size - 1] > floor)) return;
  int64_t first = 0;
  double lowest = fine.weights[0];
  while (first + 1 < fine.size && fine.nodes[first + 1] <= floor) lowest += fine.weights[++first];
  double node = fmax(fine.nodes[first], floor), weight = lowest;
  curve.total = 1;
  const bool sunk = node <= floor;
  if (first + 1 < fine.size && fine.nodes[first + 1] > kIsolated * node &&
      (sunk || node < kStillFalling * coarse.nodes[0])) {
    const double next = fine.nodes[first + 1];
    const double shed = sunk ? 0 : fmax(0.0, coarse.weights[0] - lowest);
    const double zeros = fmax(0.0, lowest - shed);
    curve.total = 1 - zeros;
    weight = lowest - zeros;
    if (weight > 1e-6 * lowest) {
      node = fmin(node * lowest / weight, sqrt(node * next));
    } else {
      node = next;
      weight = fine.weights[++first];
    }
  }
  const int64_t nodes = fine.size - first;
  double below = 0;
  for (int64_t j = 1; j <= nodes; ++j) {
    curve.x[j * kFiner] = log(node);
    curve.mass[j * kFiner] = below + weight / 2;
    below += weight;
    if (j == nodes) break;
    node = fine.nodes[first + j];
    weight = fine.weights[first + j];
  }
  const double lower = curve.x[kFiner];
  curve.x[0] = nodes > 1 ? lower - (curve.x[2 * kFiner] - lower) / 2 : lower;
  curve.mass[0] = 0;
  curve.points = nodes * kFiner + 1;
  for (int64_t apart = kFiner; apart > 1; apart /= 2) curve.halve(apart);
  a.points[run] = curve.points;
  a.totals[run] = curve.total;
}

}  // namespace tb::gpu
