// Arithmetic of merging, on blocks of float or double. Compiled once per instruction set, without
// fused operations, and with the same sums of lanes everywhere: the bits are the same on all.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/merge_kernels.h"
#include "cpu/vec.h"

#if defined(TB_ISA_AVX512)
#include <immintrin.h>
#endif

namespace tb {
namespace TB_ISA {
namespace {

constexpr int kSums = 32;  // lanes of an inner product

template <typename T>
T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <typename T>
void subtract(const T* TB_RESTRICT base, int64_t n, T* TB_RESTRICT x) {
  for (int64_t j = 0; j < n; ++j) x[j] -= base[j];
}

template <typename T>
void add_scaled(const T* TB_RESTRICT x, T weight, int64_t n, T* TB_RESTRICT sum) {
  for (int64_t j = 0; j < n; ++j) sum[j] += weight * x[j];
}

template <typename T>
void drop(const uint8_t* TB_RESTRICT rank, T factor, int64_t n, T* TB_RESTRICT x) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  for (int64_t j = 0; j < n; ++j) {
    // By bits: GCC makes no AVX2 vectors of a choice between numbers by bytes.
    const T kept = x[j] * factor;
    Bits bits;
    std::memcpy(&bits, &kept, sizeof(T));
    bits &= static_cast<Bits>(0) - static_cast<Bits>(rank[j] == 0);
    std::memcpy(&x[j], &bits, sizeof(T));
  }
}

template <typename T>
void trim(T threshold, int64_t n, T* x) {
  for (int64_t j = 0; j < n; ++j) {
    x[j] = magnitude(x[j]) >= threshold ? x[j] : T(0);
  }
}

template <typename T>
void elect(const T* TB_RESTRICT x, T weight, const T* TB_RESTRICT direction, int64_t n,
           T* TB_RESTRICT sum, T* TB_RESTRICT total) {
  for (int64_t j = 0; j < n; ++j) {
    const T along = direction[j] >= 0 ? x[j] : -x[j];
    const T voice = along > 0 ? weight : T(0);
    sum[j] += voice * x[j];
    total[j] += voice;
  }
}

template <typename T>
void divide(const T* TB_RESTRICT total, int64_t n, T* TB_RESTRICT sum) {
  for (int64_t j = 0; j < n; ++j) {
    const T divisor = total[j] == 0 ? T(1) : total[j];
    sum[j] /= divisor;
  }
}

inline double total(double* sums) {
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// Sum of term(j) over 0 <= j < n.
template <typename Term>
inline double sum_of(int64_t n, Term term) {
  double sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= n; j += kSums) {
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += term(j + lane);
  }
  for (int lane = 0; j + lane < n; ++lane) sums[lane] += term(j + lane);
  return total(sums);
}

template <typename T>
double inner(const T* x, const T* y, int64_t n) {
  return sum_of(n,
                [=](int64_t j) { return static_cast<double>(x[j]) * static_cast<double>(y[j]); });
}

template <typename T>
double magnitudes(const T* x, int64_t n) {
  return sum_of(n, [=](int64_t j) { return static_cast<double>(magnitude(x[j])); });
}

// The elements from `j` on.
template <typename T>
void tally_rest(const T* x, int64_t j, int64_t n, T low, T high, int64_t* counts, T* kept) {
  int32_t above = 0, at_high = 0, at_low = 0, between = 0;  // 32 bits: vectors of as many lanes
  for (int64_t i = j; i < n; ++i) {
    const T size = magnitude(x[i]);
    above += size > high ? 1 : 0;
    at_high += size == high ? 1 : 0;
    at_low += size == low ? 1 : 0;
    between += (size > low) & (size < high) ? 1 : 0;
  }
  counts[0] += above;
  counts[1] += at_high;
  counts[2] += at_low;
  const int64_t last = counts[3] + between;
  // Without a branch: each is written, and the next over those that are not wanted.
  for (int64_t at = counts[3]; at < last; ++j) {
    const T size = magnitude(x[j]);
    kept[at] = size;
    at += (size > low) & (size < high) ? 1 : 0;
  }
  counts[3] = last;
}

#if defined(TB_ISA_AVX512)

inline __mmask16 above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline __mmask16 equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline __mmask8 above(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
inline __mmask8 equal(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
inline __m512 magnitudes_at(const float* x) { return _mm512_abs_ps(_mm512_loadu_ps(x)); }
inline __m512d magnitudes_at(const double* x) { return _mm512_abs_pd(_mm512_loadu_pd(x)); }
inline __m512 filled(float x) { return _mm512_set1_ps(x); }
inline __m512d filled(double x) { return _mm512_set1_pd(x); }
inline void store_some(__mmask16 some, __m512 x, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(some, x));
}
inline void store_some(__mmask8 some, __m512d x, double* to) {
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(some, x));
}
inline int64_t ones(unsigned mask) { return _mm_popcnt_u32(mask); }

template <typename T>
void tally(const T* x, int64_t n, T low, T high, int64_t* counts, T* kept) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  const auto least = filled(low), most = filled(high);
  int64_t above_high = 0, at_high = 0, at_low = 0, between = 0, j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const auto size = magnitudes_at(x + j);
    const auto some =
        static_cast<decltype(above(size, least))>(above(size, least) & above(most, size));
    above_high += ones(above(size, most));
    at_high += ones(equal(size, most));
    at_low += ones(equal(size, least));
    store_some(some, size, kept + between);  // whole vectors: never beyond kept + j + kLanes
    between += ones(some);
  }
  counts[0] = above_high;
  counts[1] = at_high;
  counts[2] = at_low;
  counts[3] = between;
  tally_rest(x, j, n, low, high, counts, kept);
}

#else

template <typename T>
void tally(const T* x, int64_t n, T low, T high, int64_t* counts, T* kept) {
  counts[0] = counts[1] = counts[2] = counts[3] = 0;
  tally_rest(x, 0, n, low, high, counts, kept);
}

#endif

template <typename T>
constexpr MergeArithmetic<T> arithmetic() {
  return {subtract<T>, add_scaled<T>, drop<T>,       trim<T>, elect<T>,
          divide<T>,   inner<T>,      magnitudes<T>, tally<T>};
}

}  // namespace

const MergeArithmetic<float>& merge_arithmetic_f32() {
  static constexpr auto table = arithmetic<float>();
  return table;
}

const MergeArithmetic<double>& merge_arithmetic_f64() {
  static constexpr auto table = arithmetic<double>();
  return table;
}

}  // namespace TB_ISA
}  // namespace tb
