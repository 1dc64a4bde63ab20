// y += W^T (W x), or W (W^T x), for a bfloat16 W and 16 probes at once, W read from memory once.
//
// The arithmetic is that of a tile unit: tiles of 16 x 16 sums, and a step that adds the product of
// two operands of 16 x 32 bfloat16 numbers, all 32 along the dimension that is summed over:
//   rows    16 rows of 32 numbers
//   pairs   16 rows of 16 pairs, element k of column n at row k / 2, pair n, place k % 2
// A block of W is `rows` where it lies. To multiply it from the left it must become `pairs`, which
// interleaves its rows two by two.
//
// Tall matrices go by panels of rows: t = W x for the panel, rounded to bfloat16, then y += W^T t,
// while the next panel is fetched. Wide ones go by panels of columns in the same way with the roles
// exchanged, but copied when fetched: what is one large row apart falls into few sets of a cache.
//
// Template parameters:
//   Tiles   four tiles of sums, one operand that they share and one that each has for itself
//   Lanes   vectors of 64 bytes
// Both are local to the file that includes this one, hence everything here is, too: what is
// compiled for one machine never ends up in code for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/gram_bf16_operands.h"
#include "cpu/gram_bf16_panel.h"

namespace tb {

template <typename Tiles, typename Lanes>
class GramBf16 {
 public:
  // See GramBf16Apply in cpu/isa.h.
  static void apply(const uint16_t* w, int64_t ld, int64_t rows, int64_t cols, bool wide,
                    const float* x, int64_t ldx, float* y, int64_t ldy, void* scratch) {
    GramBf16 pass(w, ld, rows, cols, wide, static_cast<char*>(scratch));
    pass.run(x, ldx, y, ldy);
  }

  // Bytes; see gram_bf16_scratch() in cpu/isa.h.
  static constexpr int64_t scratch(int64_t length, bool wide) {
    return 64 + padded(length) * 96 + kMiddle * 96 + 8 * 1024 + 2 * copy_bytes(length, wide);
  }

  // See GramBf16Engine in cpu/bf16.h.
  static void multiply(const uint16_t* rows, const uint16_t* pairs, bool share_rows, float* sums) {
    Tiles tiles;
    tiles.template load<0>(sums);
    tiles.share(share_rows ? rows : pairs);
    if (share_rows) {
      tiles.template add_pairs<0>(pairs);
    } else {
      tiles.template add_rows<0>(rows, kBlock);
    }
    tiles.template store<0>(sums);
  }

 private:
  using Vector = typename Lanes::Vector;
  using Blocks = Bf16Blocks<Lanes>;
  using Side = typename Blocks::Side;
  using Panel = typename Blocks::Panel;
  using Operands = Bf16Operands<Lanes>;

  static constexpr int64_t kBlock = Blocks::kBlock;
  static constexpr int64_t kOperand = 512;  // bfloat16 numbers of an operand: 1 KiB
  static constexpr int64_t kSums = 256;     // floats of a tile: 1 KiB
  static constexpr int64_t kMiddle = 256;   // longest panel

  // Two panels must fit into the second-level cache together with x and y.
  static constexpr int64_t kPanelBytes = 256 << 10;
  static constexpr int64_t kMaxPanelRows = 128;
  static constexpr int64_t kMinPanelCols = 64;
  static constexpr int64_t kMaxPanelCols = 256;

  static constexpr int64_t padded(int64_t length) { return (length + 63) / 64 * 64; }
  static constexpr int64_t copy_bytes(int64_t length, bool wide) {
    return wide ? Blocks::most(kPanelBytes, 2 * kMinPanelCols * padded(length))
                : 2 * kBlock * Blocks::most(kMaxPanelRows, padded(length));
  }

  GramBf16(const uint16_t* w, int64_t ld, int64_t rows, int64_t cols, bool wide, char* scratch)
      : w_(w), ld_(ld), rows_(rows), cols_(cols), wide_(wide), side_{0, wide ? rows : cols} {
    char* next = scratch + (64 - (reinterpret_cast<uintptr_t>(scratch) & 63)) % 64;
    const auto take = [&next](int64_t bytes) {
      char* start = next;
      next += bytes;
      return start;
    };
    const int64_t length = padded(side_.end);
    x_ = reinterpret_cast<uint16_t*>(take(length * 32));
    y_ = reinterpret_cast<float*>(take(length * 64));
    middle_ = reinterpret_cast<float*>(take(kMiddle * 64));
    operand_ = reinterpret_cast<uint16_t*>(take(kMiddle * 32));
    pairs_ = reinterpret_cast<uint16_t*>(take(8 * 1024));
    for (uint16_t*& copy : copies_) {
      copy = reinterpret_cast<uint16_t*>(take(copy_bytes(side_.end, wide)));
    }
    std::memset(y_, 0, static_cast<size_t>(length) * 64);
  }

  void run(const float* x, int64_t ldx, float* y, int64_t ldy) {
    const int64_t longer = wide_ ? cols_ : rows_;
    const int64_t step = panel_size();
    Panel next = fetch(0, Blocks::least(step, longer));
    for (int64_t i = 0; i < side_.blocks(); ++i) {
      Operands::read(x, ldx, side_, i, !wide_, x_ + i * kOperand);
      for (int64_t k = 0; k < step; k += 8) fetch_.some();  // the lines of the first panel's block
    }
    for (int64_t end = Blocks::least(step, longer), last = 0; last < longer;
         last = end, end += step) {
      fetch_.rest();
      const Panel panel = next;
      if (end < longer) next = fetch(end, Blocks::least(step, longer - end));
      if (wide_) {
        multiply_left(panel, x_, middle_, false);
        for (int64_t i = 0; i < panel.cols.blocks(); ++i) {
          Operands::pairs_from_columns(middle_ + i * 2 * kSums, panel.cols, i,
                                       operand_ + i * kOperand);
        }
        multiply_right(panel, operand_, y_, true);
      } else {
        multiply_right(panel, x_, middle_, false);
        for (int64_t i = 0; i < panel.rows.blocks(); ++i) {
          Operands::rows_from_rows(middle_ + i * 2 * kSums, panel.rows, i, operand_ + i * kOperand);
        }
        multiply_left(panel, operand_, y_, true);
      }
    }
    for (int64_t i = 0; i < side_.blocks(); ++i) {
      Operands::add(y_ + i * 2 * kSums, !wide_, side_, i, y, ldy);
    }
  }

  int64_t panel_size() const {
    const int64_t fitting = kPanelBytes / (2 * side_.end) / 64 * 64;
    if (wide_) return Blocks::most(kMinPanelCols, Blocks::least(kMaxPanelCols, fitting));
    return Blocks::most(kBlock, Blocks::least(kMaxPanelRows, fitting));
  }

  // Starts to fetch a panel; it is there when fetch_.rest() has returned.
  Panel fetch(int64_t first, int64_t size) {
    const uint16_t* from = w_ + (wide_ ? first : first * ld_);
    const int64_t rows = wide_ ? rows_ : size, cols = wide_ ? size : cols_;
    if (!wide_ && rows_ >= kBlock && cols_ >= kBlock) {
      fetch_.start(from, ld_, rows, cols, nullptr, 0);
      return {w_, ld_, {first, first + size}, {0, cols_}};
    }
    // A copy has at least 32 rows and columns.
    const int64_t height = Blocks::most(rows, kBlock), width = Blocks::most(cols, kBlock);
    uint16_t* copy = copies_[turn_];
    turn_ ^= 1;
    if (height > rows || width > cols) {
      std::memset(copy, 0, static_cast<size_t>(height * width) * 2);
    }
    fetch_.start(from, ld_, rows, cols, copy, width);
    return {copy, width, {0, height}, {0, width}};
  }

  // sums (rows of the panel, 16) = or += W times pairs (columns of the panel, 16).
  void multiply_right(const Panel& p, const uint16_t* pairs, float* sums, bool add) {
    int64_t i = 0;
    for (; i + 1 < p.rows.blocks(); i += 2) multiply_strip<2>(p, i, pairs, sums, add);
    if (i < p.rows.blocks()) multiply_strip<1>(p, i, pairs, sums, add);
  }

  template <int kBlocks>
  void multiply_strip(const Panel& p, int64_t i, const uint16_t* pairs, float* sums, bool add) {
    const uint16_t* above = p.w + p.rows.start(i) * p.ld;
    const uint16_t* below = p.w + p.rows.start(i + kBlocks - 1) * p.ld;
    float* tile = sums + i * 2 * kSums;
    open<2 * kBlocks>(tile, add);
    for (int64_t j = 0; j < p.cols.blocks(); ++j) {
      const int64_t c = p.cols.start(j);
      tiles_.share(pairs + j * kOperand);
      tiles_.template add_rows<0>(above + c, p.ld);
      fetch_.some();
      tiles_.template add_rows<1>(above + 16 * p.ld + c, p.ld);
      fetch_.some();
      if constexpr (kBlocks == 2) {
        tiles_.template add_rows<2>(below + c, p.ld);
        fetch_.some();
        tiles_.template add_rows<3>(below + 16 * p.ld + c, p.ld);
        fetch_.some();
      }
    }
    close<2 * kBlocks>(tile);
  }

  // sums (16, columns of the panel) = or += rows (16, rows of the panel) times W, two blocks of
  // columns at a time; an odd last one is done twice, for nothing. The columns of a block are in
  // the order that Lanes::interleave() gives them.
  //
  // Pairs are interleaved one step before they are multiplied, so that no tile has to wait for the
  // stores that make it.
  void multiply_left(const Panel& p, const uint16_t* rows, float* sums, bool add) {
    const int64_t depth = p.rows.blocks(), width = p.cols.blocks();
    int64_t turn = 0;
    for (int quarter = 0; quarter < 4; ++quarter) interleave(p, 0, 0, quarter, turn);
    for (int64_t j = 0; j < width; j += 2) {
      float* tile = sums + j * 2 * kSums;
      open<4>(tile, add);
      for (int64_t i = 0; i < depth; ++i) {
        const uint16_t* pairs = pairs_ + turn * 4 * kOperand;
        turn ^= 1;
        const bool last = i + 1 == depth;
        const int64_t next_i = last ? 0 : i + 1, next_j = last ? j + 2 : j;
        const bool more = next_j < width;
        tiles_.share(rows + i * kOperand);
        tiles_.template add_pairs<0>(pairs);
        if (more) interleave(p, next_i, next_j, 0, turn);
        tiles_.template add_pairs<1>(pairs + kOperand);
        if (more) interleave(p, next_i, next_j, 1, turn);
        tiles_.template add_pairs<2>(pairs + 2 * kOperand);
        if (more) interleave(p, next_i, next_j, 2, turn);
        tiles_.template add_pairs<3>(pairs + 3 * kOperand);
        if (more) interleave(p, next_i, next_j, 3, turn);
      }
      close<4>(tile);
    }
  }

  // A quarter of blocks (i, j) and (i, j + 1) as pairs: 16 rows of one of them.
  void interleave(const Panel& p, int64_t i, int64_t j, int quarter, int64_t turn) {
    const int64_t r = p.rows.start(i) + quarter % 2 * 16, c = p.cols.start(j + quarter / 2);
    const uint16_t* from = p.w + r * p.ld + c;
    uint16_t* to = pairs_ + (turn * 4 + quarter / 2 * 2) * kOperand + quarter % 2 * (kOperand / 2);
    for (int64_t k = 0; k < 8; ++k) {
      const uint16_t* even = from + 2 * k * p.ld;
      Vector low, high;
      Lanes::interleave(Lanes::load(even), Lanes::load(even + p.ld), low, high);
      Lanes::store(to + k * kBlock, low);
      Lanes::store(to + kOperand + k * kBlock, high);
    }
    fetch_.some();
  }

  template <int kTiles>
  void open(const float* sums, bool add) {
    if (add) {
      tiles_.template load<0>(sums);
      tiles_.template load<1>(sums + kSums);
      if constexpr (kTiles == 4) tiles_.template load<2>(sums + 2 * kSums);
      if constexpr (kTiles == 4) tiles_.template load<3>(sums + 3 * kSums);
    } else {
      tiles_.template zero<0>();
      tiles_.template zero<1>();
      if constexpr (kTiles == 4) tiles_.template zero<2>();
      if constexpr (kTiles == 4) tiles_.template zero<3>();
    }
  }

  template <int kTiles>
  void close(float* sums) {
    tiles_.template store<0>(sums);
    tiles_.template store<1>(sums + kSums);
    if constexpr (kTiles == 4) tiles_.template store<2>(sums + 2 * kSums);
    if constexpr (kTiles == 4) tiles_.template store<3>(sums + 3 * kSums);
  }

  const uint16_t* w_;
  int64_t ld_, rows_, cols_;
  bool wide_;
  Side side_;  // of the vectors
  uint16_t* x_;
  float* y_;
  float* middle_;      // W x or W^T x of one panel
  uint16_t* operand_;  // the same, rounded
  uint16_t* pairs_;    // two turns of two blocks of W as pairs
  uint16_t* copies_[2];
  int turn_ = 0;
  typename Blocks::Fetch fetch_;
  Tiles tiles_;
};

}  // namespace tb
