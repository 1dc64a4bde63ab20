// Between the bits of a number and a float. Branch-free, so that loops around them become vectors.
// Included only by files that are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// A number of one sign bit, kExponent and kMantissa bits, with infinities and NaN as IEEE has them
// or, if kFinite, with one NaN, all bits set, in their place.
template <typename T, int kExponent, int kMantissa, bool kFinite = false>
struct Small {
  static constexpr int kBits = 1 + kExponent + kMantissa;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr uint32_t kSign = 1u << (kBits - 1);
  static constexpr uint32_t kInfinity = ((1u << kExponent) - 1) << kMantissa;
  static constexpr uint32_t kFirstBad = kFinite ? kSign - 1 : kInfinity;

  static float decode(T stored) {
    const uint32_t sign = (stored & kSign) << (32 - kBits);
    const uint32_t magnitude = static_cast<uint32_t>(stored & (kSign - 1)) << (23 - kMantissa);
    // Normal: the exponent's bias is other. Subnormal: as a normal number, less its implied digit.
    constexpr uint32_t kShift = static_cast<uint32_t>(127 - kBias) << 23, kOne = 1u << 23;
    const uint32_t normal = magnitude + kShift;
    const uint32_t subnormal = as_bits(as_float(normal + kOne) - as_float(kShift + kOne));
    const bool bad = (stored & (kSign - 1)) >= kFirstBad;
    const uint32_t value = magnitude < kOne ? subnormal : normal;
    return as_float(value | (bad ? 0x7f800000u : 0u) | (bad && kFinite ? 0x400000u : 0u) | sign);
  }

  static T encode(float value) {
    const uint32_t bits = as_bits(value), sign = (bits >> (32 - kBits)) & kSign;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal: drop digits, half of the last one added, less one bit where it is even.
    constexpr int kDropped = 23 - kMantissa;
    const uint32_t odd = (magnitude >> kDropped) & 1;
    const uint32_t rounded = magnitude + ((1u << (kDropped - 1)) - 1 + odd);
    const uint32_t normal = (rounded - (static_cast<uint32_t>(127 - kBias) << 23)) >> kDropped;
    // Subnormal: adding a number whose last digit is the smallest subnormal rounds there.
    constexpr uint32_t kShifter = (127u - kBias + 1 + kDropped) << 23;
    const uint32_t subnormal = as_bits(as_float(magnitude) + as_float(kShifter)) - kShifter;
    const bool is_normal = magnitude >= (static_cast<uint32_t>(127 - kBias + 1) << 23);
    uint32_t out = is_normal ? normal : subnormal;
    out = out > kInfinity ? kInfinity : out;
    out = magnitude > 0x7f800000u ? (kInfinity | 1u << (kMantissa - 1)) : out;  // quiet NaN
    out = magnitude == 0x7f800000u ? kInfinity : out;
    return static_cast<T>(sign | out);
  }
};

using Half = Small<uint16_t, 5, 10>;
using E5m2 = Small<uint8_t, 5, 2>;
using E4m3 = Small<uint8_t, 4, 3, true>;

struct BFloat {
  static float decode(uint16_t stored) { return as_float(static_cast<uint32_t>(stored) << 16); }
  static uint16_t encode(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
  }
};

}  // namespace TB_ISA
}  // namespace tb
