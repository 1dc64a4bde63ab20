// Twins of the instructions in csrc/cuda/instructions.h, written from the PTX ISA: asynchronous
// copies, ldmatrix and mma.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "simt.h"

namespace simt {

struct Counters {
  uint64_t weight_bytes = 0;
};
inline Counters& counters() {
  static Counters count;
  return count;
}
inline void count_weights(uint64_t bytes) {
  const Hide hide;
  counters().weight_bytes += bytes;
}

inline void require_alignment(const void* address, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(std::string(instruction) + " of an address that is not a multiple of 16, " +
         who(running()));
  }
}

// ---- asynchronous copies: they happen as late as they may, when they are waited for
// --------------

inline void copy_later(void* to, const void* from, int bytes) {
  {
    const Hide hide;
    require_alignment(to, "cp.async");
    if (bytes > 0) require_alignment(from, "cp.async");
    running().copies.back().push_back({to, from, static_cast<size_t>(bytes)});
  }
  std::memset(to, 0xFF, 16);  // NaN until it arrives
}

inline void commit_copies() {
  const Hide hide;
  running().copies.emplace_back();
}

inline void wait_for_copies(int pending) {
  std::vector<std::vector<Copy>> arrived;
  {
    const Hide hide;
    auto& groups = running().copies;
    while (groups.size() > static_cast<size_t>(pending) + 1) {
      arrived.push_back(std::move(groups.front()));
      groups.erase(groups.begin());
    }
  }
  for (const auto& group : arrived) {
    for (const Copy& copy : group) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

// ---- matrices
// ------------------------------------------------------------------------------------

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Matrices {
  uint16_t row[8];  // the one that this lane points to: row lane % 8 of matrix lane / 8
  uint16_t pairs[4][2];

  template <bool kTransposed>
  static void combine(void* const* data, unsigned) {
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned g = l / 4, t = l % 4;
      for (unsigned m = 0; m < 4; ++m) {
        for (unsigned i = 0; i < 2; ++i) {
          const unsigned row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
          static_cast<Matrices*>(data[l])->pairs[m][i] =
              static_cast<const Matrices*>(data[8 * m + row])->row[column];
        }
      }
    }
  }
};

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  require_alignment(row, "ldmatrix");
  Matrices mine;
  std::memcpy(mine.row, row, sizeof(mine.row));
  warp_operation(kWholeWarp, &mine,
                 transposed ? Matrices::combine<true> : Matrices::combine<false>);
  std::memcpy(r, mine.pairs, sizeof(mine.pairs));
}

inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float to_float(__half v) { return __half2float(v); }

template <typename T>
struct Product {
  T a[4][2], b[2][2];
  float d[4];

  static void combine(void* const* data, unsigned) {
    float a[16][16], b[16][8];
    for (unsigned l = 0; l < kWarp; ++l) {
      const auto* from = static_cast<const Product*>(data[l]);
      const unsigned g = l / 4, t = l % 4;
      for (unsigned i = 0; i < 2; ++i) {
        for (unsigned r = 0; r < 4; ++r) {
          a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = to_float(from->a[r][i]);
        }
        for (unsigned r = 0; r < 2; ++r) b[2 * t + i + r * 8][g] = to_float(from->b[r][i]);
      }
    }
    for (unsigned l = 0; l < kWarp; ++l) {
      auto* to = static_cast<Product*>(data[l]);
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
        for (unsigned k = 0; k < 16; ++k) to->d[i] += a[row][k] * b[k][column];
      }
    }
  }
};

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product<T> mine;
  std::memcpy(static_cast<void*>(mine.a), a, sizeof(a));
  std::memcpy(static_cast<void*>(mine.b), b, sizeof(b));
  std::memcpy(mine.d, d, sizeof(d));
  warp_operation(kWholeWarp, &mine, Product<T>::combine);
  std::memcpy(d, mine.d, sizeof(d));
}

}  // namespace simt
