// Gauss quadrature of Jacobi matrices, one thread for each (Golub and Welsch, "Calculation of Gauss
// quadrature rules", Math. Comp. 23 (1969)): implicit QL with Wilkinson's shift (EISPACK's imtql2,
// after Dubrulle), which carries along the first components of the eigenvectors alone. As
// csrc/cpu/gauss_quadrature.cpp.
//
// Of every Lanczos run there are three rules: of all its steps, of the first half and of the first
// quarter of them, which a shorter run would give. Neighbouring threads work on neighbouring
// columns of nodes, weights and off-diagonals.
#pragma once

#include "cuda/block.h"
#include "cuda/quadrature.h"

namespace tb::gpu {

constexpr int kRules = 3;
constexpr int kFull = 0, kHalf = 1, kQuarter = 2;

// A column of one of these arrays.
struct Column {
  double* top;
  int64_t stride;

  __device__ double& operator[](int64_t i) const { return top[i * stride]; }
};

struct Rule {
  Column nodes;    // ascending; the last is NaN if the run was not finite
  Column weights;  // their sum is 1
  int64_t size;
};

__device__ inline Rule rule_of(const QuadratureArgs& a, int64_t run, int which) {
  const int64_t taken = a.taken[run];
  // A run that ended by itself knows all that its start vector can tell.
  const bool ended = taken < a.steps || taken >= a.count[run / a.probes];
  const int64_t part = ended ? taken : taken >> which;
  const int64_t place = which * a.runs + run, stride = kRules * a.runs;
  return {{a.nodes + place, stride}, {a.weights + place, stride}, part > 1 ? part : 1};
}

// One sweep on rows first .. last.
__device__ inline void sweep(const Column& d, const Column& e, const Column& z, int64_t first,
                             int64_t last) {
  double g = (d[first + 1] - d[first]) / (2 * e[first]);
  double r = sqrt(g * g + 1);
  g = d[last] - d[first] + e[first] / (g + copysign(r, g));
  double s = 1, c = 1, p = 0;
  for (int64_t i = last - 1; i >= first; --i) {
    const double f = s * e[i], b = c * e[i];
    r = sqrt(f * f + g * g);
    e[i + 1] = r;
    if (r == 0) {  // split in the middle
      d[i + 1] -= p;
      e[last] = 0;
      return;
    }
    s = f / r;
    c = g / r;
    g = d[i + 1] - p;
    r = (d[i] - g) * s + 2 * c * b;
    p = s * r;
    d[i + 1] = g + p;
    g = c * r - b;
    const double upper = z[i + 1];
    z[i + 1] = s * z[i] + c * upper;
    z[i] = c * z[i] - s * upper;
  }
  d[first] -= p;
  e[first] = g;
  e[last] = 0;
}

// Nodes and weights from what the columns hold: diagonal, first components, off-diagonals.
__device__ inline void diagonalise(const Rule& rule, const Column& e) {
  constexpr double kEps = 2.220446049250313e-16;
  constexpr int kSweeps = 60;  // for one eigenvalue; two or three are usual
  const Column &d = rule.nodes, &z = rule.weights;
  for (int64_t first = 0; first < rule.size; ++first) {
    for (int tries = 0; tries < kSweeps; ++tries) {
      int64_t last = first;
      while (last + 1 < rule.size && fabs(e[last]) > kEps * (fabs(d[last]) + fabs(d[last + 1]))) {
        ++last;
      }
      if (last == first) break;
      sweep(d, e, z, first, last);
    }
  }
  for (int64_t i = 0; i < rule.size; ++i) {  // sorted by insertion
    const double node = d[i], weight = z[i] * z[i];
    int64_t j = i;
    for (; j > 0 && d[j - 1] > node; --j) {
      d[j] = d[j - 1];
      z[j] = z[j - 1];
    }
    d[j] = node;
    z[j] = weight;
  }
}

__device__ inline void make_rule(const QuadratureArgs& a, int64_t run, int which) {
  const Rule rule = rule_of(a, run, which);
  const Column e{a.coupled + which * a.runs + run, kRules * a.runs};
  const double* diagonal = a.diagonal + run * a.steps;
  const double* off_diagonal = a.off_diagonal + run * a.steps;
  double largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < rule.size; ++i) {
    const double beta = i + 1 < rule.size ? off_diagonal[i] : 0;
    finite = finite && is_finite(diagonal[i]) && is_finite(beta);
    largest = fmax(largest, fmax(fabs(diagonal[i]), fabs(beta)));
  }
  if (!finite) {
    rule.nodes[rule.size - 1] = nan("");
    return;
  }
  int exponent = 0;
  frexp(largest, &exponent);
  for (int64_t i = 0; i < rule.size; ++i) {  // near 1, where squares neither overflow nor vanish
    rule.nodes[i] = ldexp(diagonal[i], -exponent);
    rule.weights[i] = i == 0 ? 1 : 0;
    e[i] = i + 1 < rule.size ? ldexp(off_diagonal[i], -exponent) : 0;
  }
  diagonalise(rule, e);
  for (int64_t i = 0; i < rule.size; ++i) rule.nodes[i] = ldexp(rule.nodes[i], exponent);
}

}  // namespace tb::gpu
