// gram_bf16.h for AMX. Tiles 0 to 3 hold the sums, 4 the shared operand, 5 to 7 the others in turn.
#include "cpu/bf16.h"
#include "cpu/gram_bf16.h"
#include "cpu/gram_bf16_avx512.h"

namespace tb {
namespace {

// Palette 1: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Instructions rather than intrinsics: those of GCC 11 to 13 want a literal for a tile and do not
// tell the compiler which memory they read.
class AmxTiles {
 public:
  AmxTiles() { __asm__ volatile("ldtilecfg %0" : : "m"(kTileConfig)); }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const float* sums) {
    load_tile<kTile>(sums, 64);
  }
  template <int kTile>
  void store(float* sums) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(sums), "r"(int64_t{64}), "i"(kTile)
                     : "memory");
  }
  void share(const uint16_t* operand) { load_tile<kShared>(operand, 64); }
  template <int kTile>
  void add_rows(const uint16_t* w, int64_t ld) {
    constexpr int kOwn = kShared + 1 + kTile % 3;
    load_tile<kOwn>(w, 2 * ld);
    multiply<kTile, kOwn, kShared>();
  }
  template <int kTile>
  void add_pairs(const uint16_t* pairs) {
    constexpr int kOwn = kShared + 1 + kTile % 3;
    load_tile<kOwn>(pairs, 64);
    multiply<kTile, kShared, kOwn>();
  }

 private:
  static constexpr int kShared = 4;

  template <int kTile>
  static void load_tile(const void* from, int64_t bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(bytes), "i"(kTile)
                     : "memory");
  }
  template <int kSums, int kRows, int kPairs>
  static void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kSums), "i"(kRows), "i"(kPairs));
  }
};

using Pass = GramBf16<AmxTiles, Avx512Lanes>;

}  // namespace

const GramBf16Engine kAmx{"amx", Pass::apply, Pass::multiply};

}  // namespace tb
