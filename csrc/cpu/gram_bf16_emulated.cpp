// gram_bf16.h without any special instruction.
#include "cpu/gram_bf16_emulated.h"

#include <cstdint>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/gram_bf16.h"

namespace tb {
namespace {

struct PortableLanes {
  struct Vector {
    uint32_t lane[16];
  };

  static void prefetch(const void*) {}
  static Vector load(const void* from) {
    Vector v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static void store(void* to, const Vector& v) { std::memcpy(to, &v, sizeof(v)); }

  // Lane i of the `low` half stands for column 8 (i / 4) + i % 4, of the `high` half for 4 more.
  static void interleave(const Vector& even, const Vector& odd, Vector& low, Vector& high) {
    uint16_t a[32], b[32];
    store(a, even);
    store(b, odd);
    for (int i = 0; i < 16; ++i) {
      const int c = i / 4 * 8 + i % 4;
      low.lane[i] = a[c] | static_cast<uint32_t>(b[c]) << 16;
      high.lane[i] = a[c + 4] | static_cast<uint32_t>(b[c + 4]) << 16;
    }
  }
  static void join(const Vector& low, const Vector& high, Vector& first, Vector& second) {
    uint32_t natural[32];
    for (int i = 0; i < 16; ++i) {
      const int c = i / 4 * 8 + i % 4;
      natural[c] = low.lane[i];
      natural[c + 4] = high.lane[i];
    }
    first = load(natural);
    second = load(natural + 16);
  }

  static Vector round(const Vector& first, const Vector& second) {
    uint16_t out[32];
    for (int i = 0; i < 16; ++i) {
      out[i] = rounded(first.lane[i]);
      out[16 + i] = rounded(second.lane[i]);
    }
    return load(out);
  }
  static Vector round_pairs(const Vector& low, const Vector& high) {
    Vector out;
    for (int i = 0; i < 16; ++i) {
      out.lane[i] = rounded(low.lane[i]) | static_cast<uint32_t>(rounded(high.lane[i])) << 16;
    }
    return out;
  }
  static void transpose(Vector (&v)[16]) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < i; ++j) {
        const uint32_t kept = v[i].lane[j];
        v[i].lane[j] = v[j].lane[i];
        v[j].lane[i] = kept;
      }
    }
  }

 private:
  static uint16_t rounded(uint32_t bits) {  // to nearest, ties to even; a NaN stays one
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

using AmxPass = GramBf16<EmulatedTiles<PortableLanes, false>, PortableLanes>;
using Avx512Bf16Pass = GramBf16<EmulatedTiles<PortableLanes, true>, PortableLanes>;

}  // namespace

const GramBf16Engine kEmulatedAmx{"amx-emulated", AmxPass::apply, AmxPass::multiply};
const GramBf16Engine kEmulatedAvx512Bf16{"avx512bf16-emulated", Avx512Bf16Pass::apply,
                                         Avx512Bf16Pass::multiply};

int64_t gram_bf16_scratch(int64_t length, bool wide) { return AmxPass::scratch(length, wide); }

}  // namespace tb
