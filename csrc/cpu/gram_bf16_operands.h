// Vectors and sums of a pass of gram_bf16.h as operands of the next product.
#pragma once

#include <cstdint>

#include "cpu/gram_bf16_panel.h"

namespace tb {

// Blocks of 32 elements of 16 probes. What does not belong to a block, see Side, counts as zero.
template <typename Lanes>
class Bf16Operands {
  using Vector = typename Lanes::Vector;
  using Side = typename Bf16Blocks<Lanes>::Side;

 public:
  // Block i of x (16, ldx) as `rows`, or as `pairs`.
  static void read(const float* x, int64_t ldx, const Side& side, int64_t i, bool pairs,
                   uint16_t* operand) {
    Vector v[16];
    for (int64_t p = 0; p < 16; ++p) {
      const float* from = x + p * ldx + side.start(i);
      float room[32] = {};
      if (side.begin(i) > 0 || side.stop(i) < 32) {
        for (int64_t k = side.begin(i); k < side.stop(i); ++k) room[k] = from[k];
        from = room;
      }
      v[p] = Lanes::round(Lanes::load(from), Lanes::load(from + 16));
    }
    if (pairs) Lanes::transpose(v);
    store(v, operand);
  }

  // Two tiles with the block's elements as rows, as `rows`: they become columns.
  static void rows_from_rows(float* sums, const Side& side, int64_t i, uint16_t* operand) {
    for (int64_t k = 0; k < 16 * side.begin(i); ++k) sums[k] = 0;
    Vector v[16];
    for (int64_t k = 0; k < 16; ++k) {
      v[k] = Lanes::round_pairs(Lanes::load(sums + 32 * k), Lanes::load(sums + 32 * k + 16));
    }
    Lanes::transpose(v);
    store(v, operand);
  }

  // Two tiles with the block's elements as columns in the order of Lanes::interleave(), as `pairs`.
  static void pairs_from_columns(const float* sums, const Side& side, int64_t i,
                                 uint16_t* operand) {
    Vector v[16];
    for (int64_t p = 0; p < 16; ++p) {
      float room[32];
      joined(sums, p, room);
      for (int64_t k = 0; k < side.begin(i); ++k) room[k] = 0;
      v[p] = Lanes::round(Lanes::load(room), Lanes::load(room + 16));
    }
    Lanes::transpose(v);
    store(v, operand);
  }

  // Adds two tiles to block i of y (16, ldy); their columns are the block's, or else their rows.
  static void add(float* sums, bool columns, const Side& side, int64_t i, float* y, int64_t ldy) {
    if (!columns) {
      transpose(sums);
      transpose(sums + 256);
    }
    for (int64_t p = 0; p < 16; ++p) {
      float room[32];
      if (columns) {
        joined(sums, p, room);
      } else {
        Lanes::store(room, Lanes::load(sums + 16 * p));
        Lanes::store(room + 16, Lanes::load(sums + 256 + 16 * p));
      }
      float* to = y + p * ldy + side.start(i);
      for (int64_t k = side.begin(i); k < side.stop(i); ++k) to[k] += room[k];
    }
  }

 private:
  static void store(const Vector (&v)[16], uint16_t* operand) {
    for (int64_t k = 0; k < 16; ++k) Lanes::store(operand + 32 * k, v[k]);
  }
  static void joined(const float* sums, int64_t p, float* room) {
    Vector first, second;
    Lanes::join(Lanes::load(sums + 16 * p), Lanes::load(sums + 256 + 16 * p), first, second);
    Lanes::store(room, first);
    Lanes::store(room + 16, second);
  }
  static void transpose(float* tile) {
    Vector v[16];
    for (int64_t k = 0; k < 16; ++k) v[k] = Lanes::load(tile + 16 * k);
    Lanes::transpose(v);
    for (int64_t k = 0; k < 16; ++k) Lanes::store(tile + 16 * k, v[k]);
  }
};

}  // namespace tb
