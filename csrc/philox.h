// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter
// in, 128 random bits out, so that an element's value depends on nothing but its key and its place.
//
// Keys and counters of tbfast:
//   key     (seed, low 32 bits; CRC-32 of the layer's name)
//   counter (element, low; element, high; purpose, block of columns, draw; seed, high)
// element = index of the matrix in its layer * its length + place in the vector.
#pragma once

#include <cstdint>

#include "portable.h"

namespace tb {

enum class Purpose : uint32_t { probe = 0, sketch = 1, rows = 2 };

struct Philox {
  uint32_t word[4];
};

// One round. The key of the next is that of this one plus kPhiloxKey0 and kPhiloxKey1.
TB_DEVICE inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                   uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
  const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
  c1 = uint32_t(p1);
  c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
  c3 = uint32_t(p0);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxKey1 = 0xBB67AE85u;  // sqrt(3) - 1

TB_DEVICE inline Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                               uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += kPhiloxKey0;
    k1 += kPhiloxKey1;
  }
  return {{c0, c1, c2, c3}};
}

// A stream of random bits of one layer.
struct Stream {
  uint64_t seed;
  uint32_t name;  // CRC-32 of the layer's name
  Purpose purpose;
  uint32_t draw;  // which of many draws for this purpose, below 2^24

  // 128 bits for an element: bit b of word w is that of column 128 * block + 32 w + b.
  TB_DEVICE Philox bits(uint64_t element, uint32_t block = 0) const {
    const uint32_t what = (uint32_t(purpose) << 30) | (block << 24) | draw;
    return philox(uint32_t(element), uint32_t(element >> 32), what, uint32_t(seed >> 32),
                  uint32_t(seed), name);
  }
};

}  // namespace tb
