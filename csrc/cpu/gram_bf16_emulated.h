// The two instructions that multiply bfloat16 numbers, in portable C++: for tests, on any machine.
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS and VDPBF16PS,
// "Operation": fused multiply-adds in float32, rounded to nearest even; subnormal numbers are zero
// going in and coming out; the control register plays no part.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

namespace tb {

// kDotProduct: VDPBF16PS for each row of sums, else TDPBF16PS for the tile.
// Lanes: makes the class local to the file that includes it; see gram_bf16.h.
template <typename Lanes, bool kDotProduct>
class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(sums_[kTile], 0, sizeof(sums_[kTile]));
  }
  template <int kTile>
  void load(const float* sums) {
    std::memcpy(sums_[kTile], sums, sizeof(sums_[kTile]));
  }
  template <int kTile>
  void store(float* sums) const {
    std::memcpy(sums, sums_[kTile], sizeof(sums_[kTile]));
  }
  void share(const uint16_t* operand) { std::memcpy(shared_, operand, sizeof(shared_)); }
  template <int kTile>
  void add_rows(const uint16_t* w, int64_t ld) {
    uint16_t rows[16][32];
    for (int64_t m = 0; m < 16; ++m) std::memcpy(rows[m], w + m * ld, sizeof(rows[m]));
    multiply(sums_[kTile], rows, shared_);
  }
  template <int kTile>
  void add_pairs(const uint16_t* from) {
    uint16_t pairs[16][32];
    std::memcpy(pairs, from, sizeof(pairs));
    multiply(sums_[kTile], shared_, pairs);
  }

 private:
  static float widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  static float flushed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static float fma(uint16_t a, uint16_t b, float c) {
    return flushed(fmaf(flushed(widened(a)), flushed(widened(b)), flushed(c)));
  }

  static void multiply(float (&sums)[16][16], const uint16_t (&rows)[16][32],
                       const uint16_t (&pairs)[16][32]) {
    for (int m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          if constexpr (kDotProduct) {
            const float sum = fma(rows[m][2 * k + 1], pairs[k][2 * n + 1], sums[m][n]);
            sums[m][n] = fma(rows[m][2 * k], pairs[k][2 * n], sum);
          } else {
            even[n] = fma(rows[m][2 * k], pairs[k][2 * n], even[n]);
            odd[n] = fma(rows[m][2 * k + 1], pairs[k][2 * n + 1], odd[n]);
          }
        }
      }
      if constexpr (!kDotProduct) {
        for (int n = 0; n < 16; ++n) {
          sums[m][n] = flushed(flushed(sums[m][n]) + flushed(even[n] + odd[n]));
        }
      }
    }
  }

  float sums_[4][16][16];
  uint16_t shared_[16][32];
};

}  // namespace tb
