// The product of any matrix with a skinny one. Compiled once per instruction set.
//
// A tile of C stays in registers while the depth runs: each row of X is loaded once per tile and
// met by one broadcast element of A per row of the tile.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

// Vectors of a tile's row, and rows for each number of vectors: as many sums as registers hold
// beside one row of X and one element of A.
#if defined(TB_ISA_AVX512)
constexpr int kMaxVectors = 5;
constexpr int kTileRows[] = {0, 12, 12, 8, 6, 5};
#else
constexpr int kMaxVectors = 3;
constexpr int kTileRows[] = {0, 8, 6, 4};
#endif

// C += A X for kRows rows and kVectors vectors of columns.
template <typename T, int kRows, int kVectors>
inline void tile(const T* a, int64_t row_step, int64_t depth_step, int64_t depth, const T* x, T* c,
                 int64_t ld) {
  using V = Vec<T>;
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V::load(c + r * ld + v * V::size);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = V::load(x + v * V::size);
    for (int r = 0; r < kRows; ++r) {
      const V element = V::fill(a[r * row_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v].add_product(element, row[v]);
    }
    a += depth_step;
    x += ld;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(c + r * ld + v * V::size);
  }
}

// Tiles of kRows rows, then of ever fewer.
template <typename T, int kVectors, int kRows = kTileRows[kVectors]>
inline void tiles(const T* a, int64_t row_step, int64_t depth_step, int64_t rows, int64_t depth,
                  const T* x, T* c, int64_t ld) {
  for (; rows >= kRows; rows -= kRows) {
    tile<T, kRows, kVectors>(a, row_step, depth_step, depth, x, c, ld);
    a += kRows * row_step;
    c += kRows * ld;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) {
      tiles<T, kVectors, kRows / 2>(a, row_step, depth_step, rows, depth, x, c, ld);
    }
  }
}

template <typename T>
inline void skinny_product(const T* a, int64_t row_step, int64_t depth_step, int64_t rows,
                           int64_t depth, const T* x, T* c, int64_t width, int64_t ld) {
  const int64_t vectors = width / Vec<T>::size;
  const int64_t groups = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = vectors * group / groups;
    const T* right = x + first * Vec<T>::size;
    T* out = c + first * Vec<T>::size;
    switch (vectors * (group + 1) / groups - first) {
#if defined(TB_ISA_AVX512)
      case 5:
        tiles<T, 5>(a, row_step, depth_step, rows, depth, right, out, ld);
        break;
      case 4:
        tiles<T, 4>(a, row_step, depth_step, rows, depth, right, out, ld);
        break;
#endif
      case 3:
        tiles<T, 3>(a, row_step, depth_step, rows, depth, right, out, ld);
        break;
      case 2:
        tiles<T, 2>(a, row_step, depth_step, rows, depth, right, out, ld);
        break;
      default:
        tiles<T, 1>(a, row_step, depth_step, rows, depth, right, out, ld);
    }
  }
}

// In double: safe from overflow for every float.
template <typename T>
inline double square_sum(const T* x, int64_t n) {
  constexpr int kSums = 32;  // independent sums, enough to hide the latency of an addition
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) {
      const double value = x[i + lane];
      sums[lane] += value * value;
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    const double value = x[i + lane];
    sums[lane] += value * value;
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

}  // namespace

void skinny_product_f32(const float* a, int64_t row_step, int64_t depth_step, int64_t rows,
                        int64_t depth, const float* x, float* c, int64_t width, int64_t ld) {
  skinny_product(a, row_step, depth_step, rows, depth, x, c, width, ld);
}

void skinny_product_f64(const double* a, int64_t row_step, int64_t depth_step, int64_t rows,
                        int64_t depth, const double* x, double* c, int64_t width, int64_t ld) {
  skinny_product(a, row_step, depth_step, rows, depth, x, c, width, ld);
}

double square_sum_f32(const float* x, int64_t n) { return square_sum(x, n); }

double square_sum_f64(const double* x, int64_t n) { return square_sum(x, n); }

}  // namespace TB_ISA
}  // namespace tb
