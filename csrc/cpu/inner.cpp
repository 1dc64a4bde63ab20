// Sums of products over a run of elements. Compiled once per instruction set.
//
// In double, and so safe from overflow for every float: on any machine with vectors the loops wait
// for memory even so. Plain loops over a fixed number of lanes, which compilers turn into vectors.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

constexpr int kSums = 32;           // independent sums, enough to hide the latency of an addition
constexpr int64_t kAhead = 1024;    // elements that the prefetch runs ahead
constexpr int64_t kCacheLine = 64;  // bytes

inline double total(double* sums) {
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <typename T>
inline void inner(const T* w, const int8_t* g, int64_t n, double* dot, double* square) {
  constexpr int64_t kPerLine = kCacheLine / sizeof(T);
  double dots[kSums] = {}, squares[kSums] = {};
  const auto add = [&](int64_t i, int lane) {
    const double x = w[i + lane];
    dots[lane] += x * g[i + lane];
    squares[lane] += x * x;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t line = 0; line < kSums; line += kPerLine) prefetch(w + i + line + kAhead);
    if (i % kCacheLine == 0) prefetch(g + i + kAhead);
    for (int lane = 0; lane < kSums; ++lane) add(i, lane);
  }
  for (int lane = 0; i + lane < n; ++lane) add(i, lane);
  *dot += total(dots);
  *square += total(squares);
}

template <typename T>
inline void movement(const T* w, const float* kept, int64_t n, double* sums) {
  double moved[kSums] = {}, along[kSums] = {}, size[kSums] = {};
  const auto add = [&](int64_t i, int lane) {
    const double before = kept[i + lane];
    const double step = w[i + lane] - before;
    moved[lane] += step * step;
    along[lane] += step * before;
    size[lane] += before * before;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) add(i, lane);
  }
  for (int lane = 0; i + lane < n; ++lane) add(i, lane);
  sums[0] += total(moved);
  sums[1] += total(along);
  sums[2] += total(size);
}

}  // namespace

void inner_f32(const float* w, const int8_t* g, int64_t n, double* dot, double* square) {
  inner(w, g, n, dot, square);
}

void inner_f64(const double* w, const int8_t* g, int64_t n, double* dot, double* square) {
  inner(w, g, n, dot, square);
}

void movement_f32(const float* w, const float* kept, int64_t n, double* sums) {
  movement(w, kept, n, sums);
}

void movement_f64(const double* w, const float* kept, int64_t n, double* sums) {
  movement(w, kept, n, sums);
}

}  // namespace TB_ISA
}  // namespace tb
