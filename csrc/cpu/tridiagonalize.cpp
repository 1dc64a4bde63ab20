// Householder reduction of a symmetric matrix to tridiagonal form, blocked as LAPACK's sytrd
// (Dongarra, Sorensen, Hammarling 1989). Compiled once per instruction set.
//
// What makes it fast is the symmetric product, half of the arithmetic: each element of the lower
// triangle is read once, kWidth columns at a time, for both of its uses. Everything is padded with
// zeros to kPad rows and starts at a multiple of kPanel, so no loop has a remainder: vectors that
// begin too early meet zeros in the Householder vector, or write above the diagonal.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

constexpr int64_t kPanel = 16;      // columns reduced before the rest of the matrix is updated
constexpr int64_t kRowBlock = 128;  // rows of an update: their 2 * kPanel vectors stay in L1

template <typename T>
inline T dot(const T* x, const T* y, int64_t n) {
  using V = Vec<T>;
  V a = V::zero(), b = V::zero();
  int64_t i = 0;
  for (; i + 2 * V::size <= n; i += 2 * V::size) {
    a.add_product(V::load(x + i), V::load(y + i));
    b.add_product(V::load(x + i + V::size), V::load(y + i + V::size));
  }
  if (i < n) a.add_product(V::load(x + i), V::load(y + i));
  return (a + b).sum();
}

// Sum of squares in double: in float, the end of a graded matrix would underflow.
template <typename T>
inline double square_norm(const T* x, int64_t n) {
  double sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) {
      sum[k] += static_cast<double>(x[i + k]) * static_cast<double>(x[i + k]);
    }
  }
  for (; i < n; ++i) sum[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// y -= a * u + b * v
template <typename T>
inline void subtract_two(T* y, T a, const T* u, T b, const T* v, int64_t n) {
  using V = Vec<T>;
  const V minus_a = V::fill(-a), minus_b = V::fill(-b);
  for (int64_t i = 0; i < n; i += V::size) {
    V sum = V::load(y + i);
    sum.add_product(minus_a, V::load(u + i));
    sum.add_product(minus_b, V::load(v + i));
    sum.store(y + i);
  }
}

// y = A x for a symmetric A, n a multiple of kPad, given by its lower triangle and the whole of its
// kPanel x kPanel diagonal blocks, by columns.
template <typename T>
void symmetric_product(const T* a, int64_t ld, int64_t n, const T* x, T* y) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::size) V::zero().store(y + i);
  for (int64_t block = 0; block < n; block += kPanel) {
    for (int64_t i = block; i < block + kPanel; i += V::size) {  // the diagonal block
      V sum = V::load(y + i);
      for (int64_t c = block; c < block + kPanel; ++c) {
        sum.add_product(V::load(a + c * ld + i), V::fill(x[c]));
      }
      sum.store(y + i);
    }
    for (int64_t c0 = block; c0 < block + kPanel; c0 += kWidth) {
      const T* columns = a + c0 * ld;
      V scale[kWidth], sum[kWidth];
      for (int c = 0; c < kWidth; ++c) {
        scale[c] = V::fill(x[c0 + c]);
        sum[c] = V::zero();
      }
      for (int64_t i = block + kPanel; i < n; i += V::size) {
        V below = V::load(y + i);
        const V right = V::load(x + i);
        for (int c = 0; c < kWidth; ++c) {
          const V element = V::load(columns + c * ld + i);
          below.add_product(element, scale[c]);
          sum[c].add_product(element, right);
        }
        below.store(y + i);
      }
      T total[kWidth];
      for (int c = 0; c < kWidth; ++c) total[c] = sum[c].sum();
      for (int c = 0; c < kWidth; ++c) y[c0 + c] += total[c];
    }
  }
}

// A -= V W^T + W V^T on the lower triangle and the diagonal blocks of a trailing matrix that begins
// at row and column `next`; other elements above the diagonal may be overwritten.
//   v, w:  kPanel columns, ld apart     pack: room for 2 * kPanel * n
template <typename T>
void rank_two_update(T* a, int64_t ld, int64_t n, int64_t next, const T* v, const T* w, T* pack) {
  using V = Vec<T>;
  constexpr int64_t kRows = 2 * V::size;
  constexpr int64_t kAlign = kRows > kPanel ? kRows : kPanel;  // whole diagonal blocks
  for (int64_t c = next; c < n; ++c) {                         // row c of (W V), contiguous
    for (int64_t k = 0; k < kPanel; ++k) {
      pack[c * 2 * kPanel + 2 * k] = w[k * ld + c];
      pack[c * 2 * kPanel + 2 * k + 1] = v[k * ld + c];
    }
  }
  for (int64_t top = next - next % kAlign; top < n; top += kRowBlock) {
    const int64_t end = top + kRowBlock < n ? top + kRowBlock : n;
    for (int64_t c0 = next; c0 < end; c0 += kWidth) {
      const int64_t diagonal = c0 - c0 % kAlign;
      for (int64_t i = diagonal > top ? diagonal : top; i < end; i += kRows) {
        V upper[kWidth], lower[kWidth];
        for (int c = 0; c < kWidth; ++c) upper[c] = lower[c] = V::zero();
        for (int64_t k = 0; k < kPanel; ++k) {
          const V v0 = V::load(v + k * ld + i), v1 = V::load(v + k * ld + i + V::size);
          const V w0 = V::load(w + k * ld + i), w1 = V::load(w + k * ld + i + V::size);
          for (int c = 0; c < kWidth; ++c) {
            const V from_w = V::fill(pack[(c0 + c) * 2 * kPanel + 2 * k]);
            const V from_v = V::fill(pack[(c0 + c) * 2 * kPanel + 2 * k + 1]);
            upper[c].add_product(v0, from_w);
            lower[c].add_product(v1, from_w);
            upper[c].add_product(w0, from_v);
            lower[c].add_product(w1, from_v);
          }
        }
        for (int c = 0; c < kWidth; ++c) {
          T* column = a + (c0 + c) * ld + i;
          (V::load(column) - upper[c]).store(column);
          (V::load(column + V::size) - lower[c]).store(column + V::size);
        }
      }
    }
  }
}

// Householder vector of x (n entries), left in x with x[0] = 1: (I - tau x x^T) x_old = beta e_0.
template <typename T>
inline T reflector(T* x, int64_t n, double* beta) {
  const double head = static_cast<double>(x[0]);
  const double tail = square_norm(x + 1, n - 1);
  x[0] = 1;
  *beta = head;
  if (tail == 0) return 0;
  const double norm = square_root(head * head + tail);
  *beta = head > 0 ? -norm : norm;
  const double scale = 1 / (head - *beta);  // may overflow a float, its products do not
  for (int64_t i = 1; i < n; ++i) x[i] = static_cast<T>(static_cast<double>(x[i]) * scale);
  return static_cast<T>((*beta - head) / *beta);
}

template <typename T>
void reduce(T* a, int64_t n, double* diagonal, double* off_diagonal, T* work) {
  const int64_t ld = padded(n);
  T* v = work;  // Householder vectors of the panel, by columns, zero above their first entry
  T* w = v + kPanel * ld;
  T* pack = w + kPanel * ld;
  for (int64_t top = 0; top < n; top += kPanel) {
    const int64_t rows = ld - top;  // of the panel and the matrix below and to the right of it
    for (int64_t j = 0; j < kPanel && top + j < n; ++j) {
      const int64_t row = top + j;
      T* column = a + row * ld;
      for (int64_t k = 0; k < j; ++k) {
        subtract_two(column + top, w[k * ld + row], v + k * ld + top, v[k * ld + row],
                     w + k * ld + top, rows);
      }
      diagonal[row] = static_cast<double>(column[row]);
      if (row + 1 == n) return;
      T* x = v + j * ld;
      T* y = w + j * ld;
      for (int64_t i = top; i <= row; ++i) x[i] = 0;
      for (int64_t i = row + 1; i < ld; ++i) x[i] = column[i];
      const T tau = reflector(x + row + 1, n - row - 1, &off_diagonal[row]);
      symmetric_product(a + top * ld + top, ld, rows, x + top, y + top);
      for (int64_t i = top; i <= row; ++i) y[i] = 0;
      for (int64_t k = 0; k < j; ++k) {
        const T* vk = v + k * ld + top;
        const T* wk = w + k * ld + top;
        subtract_two(y + top, dot(wk, x + top, rows), vk, dot(vk, x + top, rows), wk, rows);
      }
      for (int64_t i = top; i <= row; ++i) y[i] = 0;
      for (int64_t i = row + 1; i < ld; ++i) y[i] *= tau;
      const T half = tau * dot(y + top, x + top, rows) / 2;
      for (int64_t i = row + 1; i < ld; ++i) y[i] -= half * x[i];
    }
    rank_two_update(a, ld, ld, top + kPanel, v, w, pack);
  }
}

}  // namespace

void tridiagonalize_f32(float* a, int64_t n, double* diagonal, double* off_diagonal, float* work) {
  reduce(a, n, diagonal, off_diagonal, work);
}

void tridiagonalize_f64(double* a, int64_t n, double* diagonal, double* off_diagonal,
                        double* work) {
  reduce(a, n, diagonal, off_diagonal, work);
}

}  // namespace TB_ISA
}  // namespace tb
