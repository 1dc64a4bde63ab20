// The randomized singular value decomposition: Halko, Martinsson and Tropp, "Finding structure with
// randomness", SIAM Review 53 (2011), algorithms 4.4 and 5.1. Bases by repeated CholeskyQR
// (Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015) with
// Gram matrices in double, so that a float basis is lost only where it is rounding noise.
#include "rsvd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/block.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "philox.h"

namespace tb {
namespace {

constexpr int64_t kSignColumns = 8192;   // that one draw of a stream has
constexpr uint32_t kFillDraw = 1 << 20;  // draws from here on replace vanished directions

// |A|^2 for which no square and no product can overflow or vanish, in float or double.
constexpr double kSafeFrom = 1e-40, kSafeTo = 1e40;

// Condition number up to which one more CholeskyQR gives a basis good enough to multiply with, and
// one that is orthonormal to rounding.
constexpr double kUsable = 1e5, kOrthonormal = 4;

// Relative to the largest pivot of a Gram matrix in double: below it there is only rounding.
constexpr double kPivotFloor = 128 * std::numeric_limits<double>::epsilon();
constexpr int kPasses = 20;  // two are usual, four where directions vanish

// A sketch has whole vectors of columns: the last ones would cost nothing less.
constexpr int64_t kSketchStep = 16;

// Squared singular values beyond this times the largest are too uncertain to be shifted by.
constexpr double kShifted = 1e-10;
constexpr double kPi = 3.14159265358979323846;

// Times eps * |A|^2: a squared residual below it has cancelled too far to be a difference of sums.
constexpr double kCancelled = 100;

// A direction 1e-7 as long as the longest is rounding noise in float; in double one more look, or
// two, at what is left of it brings it out.
template <typename T>
constexpr int kLooks = std::is_same_v<T, double> ? 2 : 0;

// Largest cosine between singular vectors.
template <typename T>
constexpr double kCosine = std::is_same_v<T, double> ? 1e-15 : 1e-8;

int64_t sketch_columns(const RsvdOptions& options) {
  return (options.rank + options.oversample + kSketchStep - 1) / kSketchStep * kSketchStep;
}

template <typename T>
void random_signs(uint64_t seed, int64_t rows, int64_t columns, int64_t parts, Block<T>& out) {
  out.resize(rows, parts * columns);
  for (int64_t i = 0; i < rows; ++i) {
    Philox bits{};
    for (int64_t j = 0; j < columns; ++j) {
      if (j % 128 == 0) {
        const auto draw = static_cast<uint32_t>(j / kSignColumns);
        const auto block = static_cast<uint32_t>(j % kSignColumns / 128);
        // The name of a matrix is no part of the key: its factors are the same in any company.
        bits = Stream{seed, 0, Purpose::sketch, draw}.bits(static_cast<uint64_t>(i), block);
      }
      const uint32_t bit = bits.word[j % 128 / 32] >> (j % 32) & 1;
      out.row(i)[parts * j] = T(1) - T(2) * static_cast<T>(bit);
    }
  }
}

template <typename T>
void fill_randomly(Block<T>& x, int64_t column, int64_t parts, uint64_t seed, int pass) {
  const Stream stream{seed, 0, Purpose::sketch, kFillDraw + static_cast<uint32_t>(pass)};
  for (int64_t i = 0; i < x.rows(); ++i) {
    const Philox bits = stream.bits(static_cast<uint64_t>(column * x.rows() + i));
    T* element = x.row(i) + column;
    for (int64_t part = 0; part < parts; ++part) {
      element[part] = static_cast<T>(bits.word[part] * 4.656612873077393e-10 - 1);
    }
  }
}

// Turns X into a basis of its range, of a condition number of about 1 + eps * condition; directions
// that vanish are replaced by random ones. Returns R of X = Q R.
template <typename T>
Small orthonormalise(const Kernels& k, Block<T>& x, Block<T>& spare, int64_t parts,
                     double condition, uint64_t seed) {
  Small total = Small::identity(x.width(), parts);
  for (int pass = 0; pass < kPasses; ++pass) {
    Small r = gram(k, x, parts);
    double largest = 0;
    for (int64_t i = 0; i < r.order(); ++i) largest = std::max(largest, r.row(i)[i]);
    const double floor = largest > 0 ? kPivotFloor * largest : 1;
    std::vector<int64_t> low;
    const double smallest = cholesky(r, floor, low);
    product(k, x, inverse(r), x.width(), spare);
    std::swap(x, spare);
    total = product(r, total);
    if (low.empty() && largest <= condition * condition * smallest) return total;
    if (pass < kLooks<T> && largest > 0) continue;
    for (const int64_t column : low) {
      fill_randomly(x, column, parts, seed, pass);
      for (int64_t i = column; i < column + parts; ++i) {
        std::fill(total.row(i), total.row(i) + total.order(), 0.0);
      }
    }
  }
  throw std::runtime_error("CholeskyQR did not converge");
}

// A power of two that brings the largest entry near 1 and that T can hold.
template <typename T>
double scale_for(double largest) {
  constexpr int kMost = std::numeric_limits<T>::max_exponent - 8;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, std::clamp(-exponent, -kMost, kMost));
}

// Writes V^H, (rank, cols), from V by rows.
template <typename T>
void write_adjoint(const Block<T>& v, int64_t parts, T* out) {
  constexpr int64_t kRun = 16;  // elements of a row written at a time
  for (int64_t first = 0; first < v.rows(); first += kRun) {
    const int64_t last = std::min(first + kRun, v.rows());
    for (int64_t p = 0; p < v.width(); p += parts) {
      T* to = out + p * v.rows();
      for (int64_t j = first; j < last; ++j) {
        to[parts * j] = v.row(j)[p];
        if (parts == 2) to[2 * j + 1] = -v.row(j)[p + 1];
      }
    }
  }
}

// The blocks that a decomposition works with; the next one uses their memory again.
template <typename T>
struct Blocks {
  Block<T> q, z, spare;
};

// q <- A A^H q - shift q but for the basis, given z = A^H q and an orthonormal q. One of
// `iterations` such steps, whose shifts make a Chebyshev polynomial of A A^H together: the odd one
// of degree 2 iterations + 1, counting the A in front, that stays small on the singular values
// below the smallest that q sees, and grows fastest above.
template <typename T>
void power_step(const Kernels& k, const View& a, Blocks<T>& blocks, int64_t step,
                int64_t iterations, uint64_t seed) {
  const Small r = orthonormalise(k, blocks.z, blocks.spare, a.parts(), kUsable, seed);
  const auto [smallest, largest] = extreme_squares(r);
  if (smallest <= kShifted * largest) return product(k, a, blocks.z, blocks.q);
  const double root = std::cos((2.0 * step + 1) / (2.0 * iterations + 1) * kPi / 2);
  product(k, blocks.q, inverse(r), blocks.q.width(), blocks.spare);
  product(k, a, blocks.z, blocks.q);
  const T shift = static_cast<T>(root * root * smallest);
  for (int64_t i = 0; i < blocks.q.rows(); ++i) {
    T* row = blocks.q.row(i);
    for (int64_t j = 0; j < blocks.q.width(); ++j) row[j] -= shift * blocks.spare.row(i)[j];
  }
}

template <typename T>
double decompose(const Matrix& matrix, const RsvdOptions& options, const Factors& out,
                 Blocks<T>& blocks) {
  const Kernels& k = kernels();
  const bool tall = matrix.rows > matrix.cols;  // then the adjoint is decomposed
  double square = 0, scale = 1;
  View a = tall ? View(matrix, 1).adjoint() : View(matrix, 1);
  const int64_t parts = a.parts();
  const int64_t columns = std::min(sketch_columns(options), a.rows());
  Block<T>&q = blocks.q, &z = blocks.z, &spare = blocks.spare;

  random_signs(options.seed, a.cols(), columns, parts, z);
  product(k, a, z, q, &square);
  if (!(square >= kSafeFrom && square <= kSafeTo)) {
    const double top = largest(k, a);
    if (!std::isfinite(top)) return std::numeric_limits<double>::quiet_NaN();
    if (top > 0) {
      scale = scale_for<T>(top);
      a = tall ? View(matrix, scale).adjoint() : View(matrix, scale);
      square = 0;
      product(k, a, z, q, &square);
    }
  }
  // With as many columns as rows the range is complete already.
  const int64_t iterations = columns < a.rows() ? options.power_iters : 0;
  for (int64_t step = iterations; step >= 0; --step) {
    orthonormalise(k, q, spare, parts, kOrthonormal, options.seed);
    product(k, a.adjoint(), q, z);
    if (step > 0) power_step(k, a, blocks, step - 1, iterations, options.seed);
  }
  // z is the adjoint of q^H A.
  const Small r = orthonormalise(k, z, spare, parts, kOrthonormal, options.seed);
  const SmallSvd small = svd(r, kCosine<T>);
  const int64_t width = parts * options.rank;
  product(k, q, small.right, width, spare);
  product(k, z, small.left, width, q);
  const Block<T>&u = tall ? q : spare, &v = tall ? spare : q;

  for (int64_t i = 0; i < u.rows(); ++i) {
    std::copy(u.row(i), u.row(i) + width, static_cast<T*>(out.u) + i * width);
  }
  write_adjoint(v, parts, static_cast<T*>(out.vh));
  double left = square;
  std::vector<double> s;
  for (int64_t p = 0; p < options.rank; ++p) {
    s.push_back(static_cast<T>(small.values[static_cast<size_t>(p)]));
    out.s[p] = s.back() / scale;
    left -= s.back() * s.back();
  }
  if (left < kCancelled * std::numeric_limits<T>::epsilon() * square) {
    left = residual(k, View(matrix, scale), u, s, v);
  }
  return square > 0 ? std::sqrt(left / square) : 0;
}

}  // namespace

std::vector<double> rsvd(const std::vector<Matrix>& matrices, const RsvdOptions& options,
                         const std::vector<Factors>& out, int threads) {
  std::vector<size_t> order(matrices.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto cost = [&](size_t i) { return matrices[i].rows * matrices[i].cols; };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return cost(i) > cost(j); });
  std::vector<double> errors(matrices.size());
  std::atomic<size_t> next{0};
  parallel_for(threads, threads, [&](int64_t) {
    Blocks<float> narrow;
    Blocks<double> wide;
    for (size_t place = next++; place < order.size(); place = next++) {
      const size_t i = order[place];
      const DType dtype = matrices[i].dtype;
      errors[i] = dtype == DType::f64 || dtype == DType::c128
                      ? decompose(matrices[i], options, out[i], wide)
                      : decompose(matrices[i], options, out[i], narrow);
    }
  });
  return errors;
}

}  // namespace tb
