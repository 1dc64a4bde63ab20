#include "cpu/small.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "cpu/isa.h"
#include "kernels.h"

namespace tb {
namespace {

constexpr int kSweeps = 60;           // of Jacobi; five or six are usual
constexpr double kVanished = 1e-140;  // of the largest singular value: its square would underflow

void add_scaled(double scale, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

double dot(const double* x, const double* y, int64_t n) {
  return std::inner_product(x, x + n, y, 0.0);
}

Small adjoint(const Small& a) {
  Small out(a.order(), a.parts());
  for (int64_t i = 0; i < a.order(); ++i) {
    for (int64_t j = 0; j < a.order(); ++j) out.row(j)[i] = a.row(i)[j];
  }
  return out;
}

// Rows from `known` on become an orthonormal completion of those before it.
void complete_basis(Small& basis, int64_t known) {
  const int64_t n = basis.order();
  int64_t candidate = 0;
  for (int64_t p = known; p < n; p += basis.parts()) {
    double* row = basis.row(p);
    // Of all unit vectors one at least keeps a 1 / n-th of its square: the others span the space.
    for (double square = 0; square < 0.5 / static_cast<double>(n);) {
      std::fill(row, row + n, 0.0);
      row[candidate++ % n] = 1;
      for (int pass = 0; pass < 2; ++pass) {  // the second removes what rounding left
        for (int64_t q = 0; q < p; ++q)
          add_scaled(-dot(basis.row(q), row, n), basis.row(q), n, row);
      }
      square = dot(row, row, n);
    }
    const double norm = std::sqrt(dot(row, row, n));
    for (int64_t i = 0; i < n; ++i) row[i] /= norm;
    basis.complete(p);
  }
}

}  // namespace

Small::Small(int64_t order, int64_t parts)
    : order_(order), parts_(parts), ld_((order + 7) / 8 * 8), data_(memory_.reserve(order * ld_)) {
  std::fill(data_, data_ + order * ld_, 0.0);
}

Small Small::identity(int64_t order, int64_t parts) {
  Small out(order, parts);
  for (int64_t i = 0; i < order; ++i) out.row(i)[i] = 1;
  return out;
}

void Small::complete(int64_t i) {
  if (parts_ == 1) return;
  const double* known = row(i);
  double* next = row(i + 1);
  for (int64_t j = 0; j < order_; j += 2) {
    next[j] = -known[j + 1];
    next[j + 1] = known[j];
  }
}

double cholesky(Small& g, double floor, std::vector<int64_t>& low) {
  const int64_t n = g.order(), parts = g.parts();
  double smallest = g.row(0)[0];
  for (int64_t j = 0; j < n; j += parts) {
    double* row = g.row(j);
    std::fill(row, row + j, 0.0);
    smallest = std::min(smallest, row[j]);
    if (row[j] < floor) {
      low.push_back(j);
      row[j] = floor;
    }
    const double root = std::sqrt(row[j]);
    for (int64_t i = j; i < n; ++i) row[i] /= root;
    g.complete(j);
    for (int64_t i = j + parts; i < n; i += parts) {
      for (int64_t t = j; t < j + parts; ++t) {
        add_scaled(-g.row(t)[i], g.row(t) + i, n - i, g.row(i) + i);
      }
    }
  }
  return smallest;
}

Small inverse(const Small& r) {
  const int64_t n = r.order(), parts = r.parts();
  Small out(n, parts);
  for (int64_t j = n - parts; j >= 0; j -= parts) {
    double* row = out.row(j);
    row[j] = 1;
    for (int64_t i = j + parts; i < n; ++i)
      add_scaled(-r.row(j)[i], out.row(i) + i, n - i, row + i);
    for (int64_t i = j; i < n; ++i) row[i] /= r.row(j)[j];
    out.complete(j);
  }
  return out;
}

Small product(const Small& a, const Small& b) {
  const int64_t n = a.order();
  Small out(n, a.parts());
  for (int64_t j = 0; j < n; j += a.parts()) {
    for (int64_t i = j; i < n; ++i) add_scaled(a.row(j)[i], b.row(i) + i, n - i, out.row(j) + i);
    out.complete(j);
  }
  return out;
}

std::pair<double, double> extreme_squares(const Small& r) {
  const int64_t n = r.order();
  std::vector<double> gram(static_cast<size_t>(n * n)), values(static_cast<size_t>(n));
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = t; i < n; ++i) add_scaled(r.row(t)[i], r.row(t) + i, n - i, &gram[i * n + i]);
  }
  symmetric_eigenvalues(gram.data(), 1, n, values.data());
  return {values.front(), values.back()};
}

SmallSvd svd(const Small& r, double tolerance) {
  const int64_t n = r.order(), parts = r.parts(), ld = 2 * r.ld();
  // Whatever makes the rows of R orthogonal, J^H, is done to the rows of a unit matrix beside it.
  Buffer<double> memory;
  double* rows = memory.reserve(n * ld);
  std::fill(rows, rows + n * ld, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    std::copy(r.row(i), r.row(i) + n, rows + i * ld);
    rows[i * ld + r.ld() + i] = 1;
  }
  std::vector<double> squares(n);
  const Kernels& k = kernels();
  for (int sweep = 0; k.jacobi_sweep(rows, n, r.ld(), ld, parts, tolerance, squares.data());) {
    if (++sweep == kSweeps) throw std::runtime_error("the Jacobi iteration did not converge");
  }
  std::vector<int64_t> order;
  for (int64_t p = 0; p < n; p += parts) order.push_back(p);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return squares[a] > squares[b]; });
  std::vector<double> values;
  Small left(n, parts), right(n, parts);
  int64_t known = 0;
  for (int64_t place = 0; place < n; place += parts) {
    const double* row = rows + order[static_cast<size_t>(place / parts)] * ld;
    values.push_back(std::sqrt(dot(row, row, n)));
    // Small rotations are rounded to lengthen vectors, and there are many.
    const double* beside = row + r.ld();
    const double length = std::sqrt(dot(beside, beside, n));
    for (int64_t i = 0; i < n; ++i) left.row(place)[i] = beside[i] / length;
    left.complete(place);
    if (values.back() > kVanished * values[0]) {
      for (int64_t i = 0; i < n; ++i) right.row(place)[i] = row[i] / values.back();
      right.complete(place);
      known = place + parts;
    }
  }
  complete_basis(right, known);
  return {std::move(values), adjoint(left), adjoint(right)};
}

}  // namespace tb
