// Types and arithmetic of CUDA: vectors, numbers of two bytes, bits of numbers.
#pragma once

#include <math.h>  // the names without std::

#include <bit>
#include <cstdint>

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline double rsqrt(double v) { return 1 / sqrt(v); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }

// Loads past the first cache.
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}

// ---- numbers of two bytes: rounded to nearest, ties to even
// --------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (isnan(v)) return {0x7fff};
  const uint32_t b = std::bit_cast<uint32_t>(v);
  return {static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float size;
  if (exponent == 31) {
    size = fraction == 0 ? HUGE_VALF : nanf("");
  } else if (exponent == 0) {
    size = ldexpf(static_cast<float>(fraction), -24);
  } else {
    size = ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return (v.bits & 0x8000) != 0 ? -size : size;
}

inline __half __float2half_rn(float v) {
  if (isnan(v)) return {0x7fff};
  const uint16_t sign = signbit(v) ? 0x8000 : 0;
  const float size = fabsf(v);
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};  // midway past the largest
  // The last place of a half: 2^-24 below 2^-14, else 2^-10 of the leading power of two. A fraction
  // that rounds up to the next power carries into the exponent.
  const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  const int places = static_cast<int>(nearbyintf(ldexpf(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + places))};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
