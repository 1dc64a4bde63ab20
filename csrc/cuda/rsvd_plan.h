// What the rsvd kernel works on: a table of matrices and lists of work items, made once from the
// shapes alone, so that no result depends on the grid or on which other matrices there are.
//
// A matrix is seen as the wide A, rows <= cols: a tall one as its adjoint. Q has its rows and Z its
// columns, so A = Q Z^H. These are its two sides; each has
//
//   products  A Z or A^H Q: a work item makes all columns of a tile of rows, from a slice of the
//             depth, and reads its part of A once
//   tiles     a tile of rows times a small matrix, in place
//   grams     a strip of rows and a pair of blocks of columns: what they add to the Gram matrix
#pragma once

#include <cstdint>
#include <vector>

#include "ragged.h"
#include "rsvd.h"

namespace tb::gpu {

constexpr int kSketch = 128;     // columns at most: a row of signs is then one Philox counter
constexpr int kGramBlock = 64;   // columns
constexpr int kSides = 2;        // 0 is Q, 1 is Z
constexpr int kRsvdResults = 3;  // residual, alpha of the tail, times that the matrix was read

// Rows of a tile: 16 groups of threads have 16 bytes of a column each.
constexpr int tile_rows(int scalar_bytes) { return 16 * (16 / scalar_bytes); }

// Offsets are in bytes from the kernel's memory, and counts of what a block is made of are those of
// its scalars: float, double, or complex ones.
struct RsvdSide {
  int64_t length;       // rows of the block
  int64_t block;        // (length, columns)
  int64_t multiplier;   // (columns, columns): what the block is to be multiplied by
  int64_t slice_depth;  // of a product
  int64_t strip_rows;   // of a Gram matrix
  int32_t slices, strips, tiles;
};

struct RsvdEntry {
  const void* data;
  int64_t row_stride, col_stride;  // of the wide view, in elements
  int64_t pieces;                  // (slices, length, columns): products of the slices of one side
  int64_t gram;                    // (strips, columns, columns), in double as all that follows
  int64_t total;                   // (2, columns, columns): R, and R before the last pass
  int64_t scratch;                 // (2, columns, columns), if they do not fit into shared memory
  int64_t values;                  // (columns): singular values
  int64_t sums;                    // (work items, 2): squares and largest entries of A
  int64_t low;                     // (columns), int32: 1 for a direction that has vanished
  int64_t out[3];                  // U, S and Vh, in bytes from the start of the factors
  RsvdSide side[kSides];
  DType dtype;
  int32_t tall;      // 1: the adjoint is decomposed
  int32_t columns;   // of the sketch
  int32_t iterates;  // 0: the range is complete without power iterations
};

struct RsvdItem {
  int32_t matrix, tile, part;  // tile or strip; slice or pair of blocks of columns
};

// Host only.
class RsvdPlan {
 public:
  // Throws std::invalid_argument where the rank is above the shorter side of a matrix or the sketch
  // would have more than kSketch columns.
  RsvdPlan(const std::vector<Matrix>& matrices, const RsvdOptions& options);

  std::vector<RsvdEntry> entries;
  std::vector<RsvdItem> products[kSides], tiles[kSides], grams[kSides];
  bool sliced[kSides] = {};  // some product of this side is made of several slices
  // Of power steps, in units of the square of the smallest singular value that the sketch sees:
  // zeros of the Chebyshev polynomial that stays small below it and grows fastest above. Empty
  // where no matrix iterates.
  std::vector<double> shifts;
  int64_t memory = 0, out_bytes = 0;
  int64_t most_items = 0;

 private:
  void add(const Matrix& m, const RsvdOptions& options, int64_t columns);
};

}  // namespace tb::gpu
