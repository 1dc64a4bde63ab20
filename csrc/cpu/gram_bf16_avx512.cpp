// gram_bf16.h for AVX512-BF16: a tile is 16 vectors, and an operand's pairs are broadcast from the
// first-level cache.
#include "cpu/gram_bf16_avx512.h"

#include "cpu/bf16.h"
#include "cpu/gram_bf16.h"
#include "cpu/gram_bf16_emulated.h"

namespace tb {
namespace {

class DotProductTiles {
 public:
  template <int kTile>
  void zero() {
    for (__m512& sum : sums_[kTile]) sum = _mm512_setzero_ps();
  }
  template <int kTile>
  void load(const float* sums) {
    for (int m = 0; m < 16; ++m) sums_[kTile][m] = _mm512_loadu_ps(sums + 16 * m);
  }
  template <int kTile>
  void store(float* sums) const {
    for (int m = 0; m < 16; ++m) _mm512_storeu_ps(sums + 16 * m, sums_[kTile][m]);
  }
  void share(const uint16_t* operand) { shared_ = operand; }
  template <int kTile>
  void add_rows(const uint16_t* w, int64_t ld) {
    // A copy: 16 rows some power of two apart would fight for the same lines at every pair.
    for (int64_t m = 0; m < 16; ++m) {
      _mm512_store_si512(rows_ + 32 * m, _mm512_loadu_si512(w + m * ld));
    }
    multiply(sums_[kTile], rows_, shared_);
  }
  template <int kTile>
  void add_pairs(const uint16_t* pairs) {
    multiply(sums_[kTile], shared_, pairs);
  }

 private:
  static void multiply(__m512 (&sums)[16], const uint16_t* rows, const uint16_t* pairs) {
    __m512 sum[16];
    for (int m = 0; m < 16; ++m) sum[m] = sums[m];
    for (int k = 0; k < 16; ++k) {
      const __m512i column = _mm512_loadu_si512(pairs + 32 * k);
      for (int m = 0; m < 16; ++m) {
        int pair;
        std::memcpy(&pair, rows + 32 * m + 2 * k, 4);
        sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)column, (__m512bh)_mm512_set1_epi32(pair));
      }
    }
    for (int m = 0; m < 16; ++m) sums[m] = sum[m];
  }

  __m512 sums_[4][16];
  alignas(64) uint16_t rows_[16 * 32];
  const uint16_t* shared_ = nullptr;
};

using Pass = GramBf16<DotProductTiles, Avx512Lanes>;
using EmulatedPass = GramBf16<EmulatedTiles<Avx512Lanes, false>, Avx512Lanes>;

}  // namespace

const GramBf16Engine kAvx512Bf16{"avx512bf16", Pass::apply, Pass::multiply};

// All but the tile unit, which most machines lack, as it runs for AMX.
const GramBf16Engine kEmulatedAmxAvx512{"amx-emulated-avx512", EmulatedPass::apply,
                                        EmulatedPass::multiply};

}  // namespace tb
