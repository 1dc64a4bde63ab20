// Vectors of 64 bytes for gram_bf16.h with AVX-512 F and BW. Included only by files compiled for
// it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tb {
namespace {

struct Avx512Lanes {
  using Vector = __m512i;

  static void prefetch(const void* line) {
    _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1);
  }
  static Vector load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(void* to, Vector v) { _mm512_storeu_si512(to, v); }

  // Pairs of the elements of two rows: columns 0-3, 8-11, 16-19 and 24-27, and then the others.
  static void interleave(Vector even, Vector odd, Vector& low, Vector& high) {
    low = _mm512_unpacklo_epi16(even, odd);
    high = _mm512_unpackhi_epi16(even, odd);
  }

  // Floats in the order of interleave() to natural order.
  static void join(Vector low, Vector high, Vector& first, Vector& second) {
    const Vector lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const Vector upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const Vector natural = _mm512_permutex2var_epi64(low, lower, high);
    second = _mm512_permutex2var_epi64(low, upper, high);
    first = natural;
  }

  // 32 floats to bfloat16.
  static Vector round(Vector first, Vector second) {
    const Vector mixed = _mm512_packus_epi32(_mm512_srli_epi32(rounded(first), 16),
                                             _mm512_srli_epi32(rounded(second), 16));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed);
  }

  // Each float of `low` to the lower half of its lane, that of `high` to the upper.
  static Vector round_pairs(Vector low, Vector high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded(low), 16), rounded(high));
  }

  static void transpose(Vector (&v)[16]) {
    Vector u[16];
    for (int i = 0; i < 16; i += 2) {
      u[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      u[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        v[i + 2 * j] = _mm512_unpacklo_epi64(u[i + j], u[i + j + 2]);
        v[i + 2 * j + 1] = _mm512_unpackhi_epi64(u[i + j], u[i + j + 2]);
      }
    }
    // Now lane l of v[4 i + j] has rows 4 i .. 4 i + 3 of column 4 l + j.
    for (int j = 0; j < 4; ++j) {
      const Vector a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
      const Vector b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
      const Vector c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
      const Vector d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
      u[j] = _mm512_shuffle_i32x4(a, c, 0x88);
      u[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
      u[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
      u[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = u[i];
  }

 private:
  // The bfloat16 nearest to each float, ties to even, in the upper half of its lane.
  static Vector rounded(Vector x) {
    const Vector odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const Vector sum = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512 value = _mm512_castsi512_ps(x);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(sum, nan, x, _mm512_set1_epi32(0x400000));
  }
};

}  // namespace
}  // namespace tb
