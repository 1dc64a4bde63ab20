// The loops of merging that are compiled once per instruction set. Each works on a block of a few
// thousand elements that stays in cache.
#pragma once

#include <cstdint>

#include "merge.h"

namespace tb {

// Of float or double.
template <typename T>
struct MergeArithmetic {
  // x -= base
  void (*subtract)(const T* base, int64_t n, T* x);
  // sum += weight x
  void (*add_scaled)(const T* x, T weight, int64_t n, T* sum);
  // x = factor x where rank is 0, else 0
  void (*drop)(const uint8_t* rank, T factor, int64_t n, T* x);
  // x = 0 where |x| < threshold
  void (*trim)(T threshold, int64_t n, T* x);
  // sum += weight x and total += weight where x has the sign of direction, whose zeros count as
  // positive
  void (*elect)(const T* x, T weight, const T* direction, int64_t n, T* sum, T* total);
  // sum /= total, or 1 where that is 0
  void (*divide)(const T* total, int64_t n, T* sum);
  double (*inner)(const T* x, const T* y, int64_t n);
  // sum of |x|
  double (*magnitudes)(const T* x, int64_t n);
  // counts: how many |x| are above high, equal to it, equal to low, and between; kept:
  // those between, in room for n
  void (*tally)(const T* x, int64_t n, T low, T high, int64_t* counts, T* kept);
};

struct MergeKernels {
  // The bytes of `calls` Philox calls from counter `first` on, 16 of each.
  void (*draw_bytes)(const DrawKey& key, uint64_t first, int64_t calls, uint8_t* bytes);
  // rank[j] = how many of the `count` values `least` are <= bytes[j]
  void (*rank_bytes)(const uint8_t* bytes, int64_t n, const uint8_t* least, int64_t count,
                     uint8_t* rank);
  // out[j] = from[j] where pick[j] is `which`; elements of `width` bytes: 1, 2, 4 or 8
  void (*take)(const void* from, const uint8_t* pick, uint8_t which, int64_t n, int64_t width,
               void* out);
  // changed[j] |= bit where from[j] differs from base[j]
  void (*mark_changed)(const void* from, const void* base, int64_t n, int64_t width, uint32_t bit,
                       uint32_t* changed);
  // pick[j] becomes the other of two models where the picked one is unchanged and the other is not
  void (*swap_unchanged)(const uint32_t* changed, int64_t n, uint8_t* pick);
  // how many pick[j] are `which`; how many changed[j] are zero
  int64_t (*count_picked)(const uint8_t* pick, uint8_t which, int64_t n);
  int64_t (*count_unchanged)(const uint32_t* changed, int64_t n);
  // whether no element is NaN or infinite
  bool (*all_finite)(const void* from, Number type, int64_t n);
  // to[j] = from[j]; wider types lose digits in float
  void (*decode_f32)(const void* from, Number type, int64_t n, float* to);
  void (*decode_f64)(const void* from, Number type, int64_t n, double* to);
  // to[j] = from[j], rounded once, to nearest, ties to even; not to 8 bits
  void (*encode_f32)(const float* from, Number type, int64_t n, void* to);
  void (*encode_f64)(const double* from, Number type, int64_t n, void* to);
};

#define TB_DECLARE_MERGE_KERNELS(isa)                    \
  namespace isa {                                        \
  const MergeKernels& merge_kernels();                   \
  const MergeArithmetic<float>& merge_arithmetic_f32();  \
  const MergeArithmetic<double>& merge_arithmetic_f64(); \
  }
TB_DECLARE_MERGE_KERNELS(scalar)
TB_DECLARE_MERGE_KERNELS(avx2)
TB_DECLARE_MERGE_KERNELS(avx512)

}  // namespace tb
