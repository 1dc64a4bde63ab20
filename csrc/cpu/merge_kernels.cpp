// Drawing, picking and copying: the loops of selection. Compiled once per instruction set, from
// plain loops over fixed numbers of lanes that compilers turn into vectors.
#include "cpu/merge_kernels.h"

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/merge_numbers.h"
#include "cpu/vec.h"
#include "philox.h"

namespace tb {
namespace TB_ISA {
namespace {

constexpr int64_t kCalls = 32;  // of Philox at a time: with fewer, compilers do not make vectors

void draw_run(const DrawKey& key, uint64_t first, uint8_t* bytes) {
  uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
  for (int64_t l = 0; l < kCalls; ++l) {
    const uint64_t counter = first + static_cast<uint64_t>(l);
    c0[l] = static_cast<uint32_t>(counter);
    c1[l] = static_cast<uint32_t>(counter >> 32);
    c2[l] = key.word[2];
    c3[l] = key.word[3];
  }
  uint32_t k0 = key.word[0], k1 = key.word[1];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int64_t l = 0; l < kCalls; ++l) {
      philox_round(c0[l], c1[l], c2[l], c3[l], k0, k1);
    }
    k0 += kPhiloxKey0;
    k1 += kPhiloxKey1;
  }
  for (int64_t l = 0; l < kCalls; ++l) {
    const uint32_t words[4] = {c0[l], c1[l], c2[l], c3[l]};
    std::memcpy(bytes + 16 * l, words, 16);
  }
}

template <typename T>
void take_as(const void* from, const uint8_t* TB_RESTRICT pick, uint8_t which, int64_t n,
             void* out) {
  const T* TB_RESTRICT in = static_cast<const T*>(from);
  T* TB_RESTRICT to = static_cast<T*>(out);
  for (int64_t j = 0; j < n; ++j) {
    const T value = in[j], before = to[j];
    to[j] = pick[j] == which ? value : before;
  }
}

template <typename T>
void mark_as(const void* from, const void* base, int64_t n, uint32_t bit,
             uint32_t* TB_RESTRICT changed) {
  const T* TB_RESTRICT in = static_cast<const T*>(from);
  const T* TB_RESTRICT old = static_cast<const T*>(base);
  for (int64_t j = 0; j < n; ++j) changed[j] |= in[j] != old[j] ? bit : 0u;
}

// Whether all exponents are below that of infinity: by the bits, so that signalling NaN are seen
// too.
template <typename T>
bool below(const void* from, int64_t n, T mask, T least) {
  const T* in = static_cast<const T*>(from);
  T largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const T magnitude = static_cast<T>(in[j] & mask);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < least;
}

template <typename T, typename To, typename Decode>
void decode_as(const void* from, int64_t n, To* TB_RESTRICT to, Decode decode) {
  const T* TB_RESTRICT in = static_cast<const T*>(from);
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<To>(decode(in[j]));
}

template <typename To>
void decode(const void* from, Number type, int64_t n, To* to) {
  switch (type) {
    case Number::f8_e4m3:
      return decode_as<uint8_t>(from, n, to, E4m3::decode);
    case Number::f8_e5m2:
      return decode_as<uint8_t>(from, n, to, E5m2::decode);
    case Number::f16:
      return decode_as<uint16_t>(from, n, to, Half::decode);
    case Number::bf16:
      return decode_as<uint16_t>(from, n, to, BFloat::decode);
    case Number::f32:
      return decode_as<float>(from, n, to, [](float x) { return x; });
    case Number::f64:
      return decode_as<double>(from, n, to, [](double x) { return x; });
    case Number::bits:
      break;
  }
}

// A float from which rounding to fewer digits gives what it would give from x itself: cut off, and
// the last bit set where something was cut off.
inline float to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  const uint32_t bits = as_bits(nearest);
  const uint32_t cut = bits - ((back < 0 ? -back : back) > (x < 0 ? -x : x) ? 1u : 0u);
  return as_float(back == x || back != back ? bits : cut | 1u);
}

inline float to_odd(float x) { return x; }

template <typename From, typename To, typename Encode>
void encode_as(const From* TB_RESTRICT from, int64_t n, void* to, Encode encode) {
  To* TB_RESTRICT out = static_cast<To*>(to);
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<To>(encode(from[j]));
}

template <typename From>
void encode(const From* from, Number type, int64_t n, void* to) {
  switch (type) {
    case Number::f16:
      return encode_as<From, uint16_t>(from, n, to, [](From x) { return Half::encode(to_odd(x)); });
    case Number::bf16:
      return encode_as<From, uint16_t>(from, n, to,
                                       [](From x) { return BFloat::encode(to_odd(x)); });
    case Number::f32:
      return encode_as<From, float>(from, n, to, [](From x) { return x; });
    case Number::f64:
      return encode_as<From, double>(from, n, to, [](From x) { return x; });
    default:
      break;
  }
}

void draw_bytes(const DrawKey& key, uint64_t first, int64_t calls, uint8_t* bytes) {
  int64_t call = 0;
  for (; call + kCalls <= calls; call += kCalls) {
    draw_run(key, first + static_cast<uint64_t>(call), bytes + 16 * call);
  }
  if (call < calls) {
    uint8_t last[16 * kCalls];
    draw_run(key, first + static_cast<uint64_t>(call), last);
    std::memcpy(bytes + 16 * call, last, static_cast<size_t>(16 * (calls - call)));
  }
}

void rank_bytes(const uint8_t* bytes, int64_t n, const uint8_t* least, int64_t count,
                uint8_t* rank) {
  std::memset(rank, 0, static_cast<size_t>(n));
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t bound = least[i];
    for (int64_t j = 0; j < n; ++j) {
      rank[j] = static_cast<uint8_t>(rank[j] + (bytes[j] >= bound ? 1 : 0));
    }
  }
}

void take(const void* from, const uint8_t* pick, uint8_t which, int64_t n, int64_t width,
          void* out) {
  switch (width) {
    case 1:
      return take_as<uint8_t>(from, pick, which, n, out);
    case 2:
      return take_as<uint16_t>(from, pick, which, n, out);
    case 4:
      return take_as<uint32_t>(from, pick, which, n, out);
    default:
      return take_as<uint64_t>(from, pick, which, n, out);
  }
}

void mark_changed(const void* from, const void* base, int64_t n, int64_t width, uint32_t bit,
                  uint32_t* changed) {
  switch (width) {
    case 1:
      return mark_as<uint8_t>(from, base, n, bit, changed);
    case 2:
      return mark_as<uint16_t>(from, base, n, bit, changed);
    case 4:
      return mark_as<uint32_t>(from, base, n, bit, changed);
    default:
      return mark_as<uint64_t>(from, base, n, bit, changed);
  }
}

void swap_unchanged(const uint32_t* TB_RESTRICT changed, int64_t n, uint8_t* TB_RESTRICT pick) {
  for (int64_t j = 0; j < n; ++j) {
    // Bit 0 set: only model 0 has changed; bit 1: only model 1.
    const uint32_t only = changed[j] == 3 ? 0 : changed[j];
    pick[j] = static_cast<uint8_t>((pick[j] & ~only & 1) | (only >> 1));
  }
}

int64_t count_picked(const uint8_t* pick, uint8_t which, int64_t n) {
  constexpr int64_t kLanes = 64, kRun = 128;  // a byte holds the sum of 128 flags
  int64_t count = 0, j = 0;
  while (j + kLanes <= n) {
    uint8_t sum[kLanes] = {};
    for (int64_t run = 0; run < kRun && j + kLanes <= n; ++run, j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sum[lane] = static_cast<uint8_t>(sum[lane] + (pick[j + lane] == which ? 1 : 0));
      }
    }
    for (const uint8_t part : sum) count += part;
  }
  for (; j < n; ++j) count += pick[j] == which ? 1 : 0;
  return count;
}

int64_t count_unchanged(const uint32_t* changed, int64_t n) {
  int32_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += changed[j] == 0 ? 1 : 0;
  return count;
}

bool all_finite(const void* from, Number type, int64_t n) {
  switch (type) {
    case Number::f8_e4m3:
      return below<uint8_t>(from, n, 0x7f, 0x7f);
    case Number::f8_e5m2:
      return below<uint8_t>(from, n, 0x7f, 0x7c);
    case Number::f16:
      return below<uint16_t>(from, n, 0x7fff, 0x7c00);
    case Number::bf16:
      return below<uint16_t>(from, n, 0x7fff, 0x7f80);
    case Number::f32:
      return below<uint32_t>(from, n, 0x7fffffffu, 0x7f800000u);
    case Number::f64:
      return below<uint64_t>(from, n, ~uint64_t{0} >> 1, 0x7ffull << 52);
    case Number::bits:
      break;
  }
  return true;
}

}  // namespace

const MergeKernels& merge_kernels() {
  static const MergeKernels table{
      draw_bytes,      rank_bytes, take,          mark_changed,   swap_unchanged, count_picked,
      count_unchanged, all_finite, decode<float>, decode<double>, encode<float>,  encode<double>};
  return table;
}

}  // namespace TB_ISA
}  // namespace tb
