// Householder reduction of small Hermitian matrices to tridiagonal form, a matrix in each lane of a
// vector: kTogether of them take the same steps, so no loop is shorter than a vector. Compiled once
// per instruction set.
//
// Column k below the diagonal is mapped to a multiple of e_0 by I - tau v v^H with a real tau: v is
// the column with its head lengthened by the column's norm. Of the off-diagonal elements only the
// magnitudes matter, the eigenvalues do not depend on their phases.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

using V = Vec<double>;

constexpr double kVanishing = 1e-290;  // squared norms that are taken for zero: 1 / 0 is near

// A complex number in each lane: real parts, then kTogether elements on, imaginary parts.
struct Complex {
  V re, im;

  static Complex load(const double* from) { return {V::load(from), V::load(from + kTogether)}; }
  static Complex zero() { return {V::zero(), V::zero()}; }
  void store(double* to) const {
    re.store(to);
    im.store(to + kTogether);
  }
  Complex minus() const { return {V::zero() - re, V::zero() - im}; }

  // += a b
  void add_product(Complex a, Complex b) {
    re.add_product(a.re, b.re);
    re.add_product(V::zero() - a.im, b.im);
    im.add_product(a.re, b.im);
    im.add_product(a.im, b.re);
  }
  // += a conj(b)
  void add_conjugate_product(Complex a, Complex b) {
    re.add_product(a.re, b.re);
    re.add_product(a.im, b.im);
    im.add_product(a.im, b.re);
    im.add_product(V::zero() - a.re, b.im);
  }
  // += a b for a real a
  void add_scaled(V a, Complex b) {
    re.add_product(a, b.re);
    im.add_product(a, b.im);
  }
};

// What makes a reflector of a column: factors of its head, and tau.
struct Reflector {
  V head, shift, tau;
};

// From the squares of the head's magnitude and of the norm of the whole column. The head becomes
// head * x_0 + shift.
Reflector reflector(V head_square, V square) {
  double heads[V::size], squares[V::size], head[V::size], shift[V::size], tau[V::size];
  head_square.store(heads);
  square.store(squares);
  for (int l = 0; l < V::size; ++l) {
    const double size = square_root(heads[l]), norm = square_root(squares[l]);
    const bool has_phase = size > 0;
    const double length = squares[l] + size * norm;  // |v|^2 / 2
    head[l] = has_phase ? 1 + norm / size : 0;
    shift[l] = has_phase ? 0 : norm;
    tau[l] = length > kVanishing ? 1 / length : 0;
  }
  return {V::load(head), V::load(shift), V::load(tau)};
}

// Lanes of one vector.
//   a: the lower triangle, by columns     v, w: n complex numbers each
void reduce(double* a, int64_t n, double* diagonal, double* squares, double* v, double* w) {
  constexpr int64_t kStep = 2 * kTogether;  // from one complex number to the next
  const auto at = [&](int64_t i, int64_t j) { return a + (j * n + i) * kStep; };
  for (int64_t k = 0; k < n; ++k) {
    V::load(at(k, k)).store(diagonal + k * kTogether);
    if (k + 1 == n) return;
    const Complex top = Complex::load(at(k + 1, k));
    V square = V::zero();
    square.add_product(top.re, top.re);
    square.add_product(top.im, top.im);
    const V head_square = square;
    for (int64_t i = k + 2; i < n; ++i) {
      const Complex x = Complex::load(at(i, k));
      square.add_product(x.re, x.re);
      square.add_product(x.im, x.im);
      x.store(v + i * kStep);
    }
    square.store(squares + k * kTogether);
    if (k + 2 == n) continue;
    const Reflector r = reflector(head_square, square);
    Complex head = {r.shift, V::zero()};
    head.add_scaled(r.head, top);
    head.store(v + (k + 1) * kStep);

    for (int64_t i = k + 1; i < n; ++i) Complex::zero().store(w + i * kStep);
    V inner = V::zero();  // v^H A v
    for (int64_t j = k + 1; j < n; ++j) {
      const Complex vj = Complex::load(v + j * kStep);
      Complex sum = Complex::load(w + j * kStep);
      sum.add_scaled(V::load(at(j, j)), vj);
      for (int64_t i = j + 1; i < n; ++i) {
        const Complex element = Complex::load(at(i, j));
        Complex below = Complex::load(w + i * kStep);
        below.add_product(element, vj);
        below.store(w + i * kStep);
        sum.add_conjugate_product(Complex::load(v + i * kStep), element);
      }
      sum.store(w + j * kStep);
      inner.add_product(sum.re, vj.re);
      inner.add_product(sum.im, vj.im);
    }
    V half = V::zero(), minus_half = V::zero();
    half.add_product(r.tau, inner);
    minus_half.add_product(half, V::fill(-0.5));
    for (int64_t i = k + 1; i < n; ++i) {
      Complex sum = Complex::load(w + i * kStep), scaled = Complex::zero();
      sum.add_scaled(minus_half, Complex::load(v + i * kStep));
      scaled.add_scaled(r.tau, sum);
      scaled.store(w + i * kStep);
    }

    for (int64_t j = k + 1; j < n; ++j) {
      const Complex minus_v = Complex::load(v + j * kStep).minus();
      const Complex minus_w = Complex::load(w + j * kStep).minus();
      for (int64_t i = j; i < n; ++i) {
        Complex element = Complex::load(at(i, j));
        element.add_conjugate_product(Complex::load(v + i * kStep), minus_w);
        element.add_conjugate_product(Complex::load(w + i * kStep), minus_v);
        element.store(at(i, j));
      }
    }
  }
}

}  // namespace

void tridiagonalize_hermitian(double* a, int64_t n, double* diagonal, double* squares,
                              double* work) {
  static_assert(kTogether % V::size == 0, "whole vectors");
  for (int64_t lane = 0; lane < kTogether; lane += V::size) {
    reduce(a + lane, n, diagonal + lane, squares + lane, work + lane,
           work + 2 * kTogether * n + lane);
  }
}

}  // namespace TB_ISA
}  // namespace tb
