// What the spectral kernel works on: a table of matrices and a list of work items, made once from
// the shapes alone, so that no result depends on the grid or on which other matrices there are.
//
// A matrix is seen as the tall T with A = T^T T: its long side are the rows, its short side, of
// length n, the columns. A complex one is seen as the real one of twice the size, rows and columns
// (re, im) interleaved. For A x:
//
//   columns   are cut into segments, each of which one block keeps on chip: x in shared memory, the
//             sums y in registers
//   rows      are cut into slices; a work item is one slice of one segment. It streams through the
//             slice by panels of a few rows, adds up y and writes it once
//   team      the items of one slice: t = T x needs all columns, so they exchange it by panels
//
// More start vectors than kProbes are more entries for the same matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/arena.h"
#include "ragged.h"

#if !defined(TB_SEGMENT)
#define TB_SEGMENT 1024
#endif

namespace tb::gpu {

constexpr int kProbes = 8;            // start vectors that one pass serves: n of the mma shape
constexpr int kSegment = TB_SEGMENT;  // columns
constexpr int kPanel = 16;            // rows of a panel of 2-byte numbers; of others half as many
constexpr int kTeamSlots = 2;         // panels whose t a team has in flight

// How a block reads the weights.
enum class Path : int32_t {
  mma,             // bf16 or f16, rows contiguous and aligned: tensor cores
  mma_transposed,  // the same, columns contiguous
  fma,             // f32, rows contiguous and aligned
  fma_transposed,  // the same, columns contiguous
  convert,         // any other: element by element, to float
};

// One matrix and up to kProbes of its start vectors. Offsets are in floats.
struct SpectralEntry {
  const void* data;
  int64_t rows, cols;              // of the tall view, in elements
  int64_t row_stride, col_stride;  // likewise
  int64_t element;                 // of the first random sign, see philox.h
  int64_t length;                  // of a vector
  int64_t basis;                   // (steps, kProbes, length): the Krylov basis
  int64_t sums;                    // (kProbes, length): y
  int64_t partials;                // (slices, kProbes, length): y of each slice
  int64_t exchange;                // (slices, kTeamSlots, segments, kPanel * kProbes): t
  int64_t arrived;                 // (slices): counters of teams
  int64_t given;                   // offset in the start vectors that the caller gave
  int64_t run;                     // index of its first run among all
  int32_t slices, slice_rows, segments;
  int32_t probes;  // that are wanted
  int32_t first_probe;
  Path path;
  DType dtype;
  int32_t conjugate;  // of complex numbers: -1 turns the sign of the imaginary part
  uint32_t name;      // CRC-32 of the layer's name
};

struct SpectralItem {
  int32_t entry, slice, segment;
};

// Entries and items that are worked on at the same time: as many as the memory may hold.
struct SpectralRound {
  int32_t entry_begin, entry_end, item_begin, item_end;
};

inline int64_t parts(DType t) { return is_complex(t) ? 2 : 1; }

// Host only.
class SpectralPlan {
 public:
  // memory: bytes that the vectors of one round may take; a single matrix may take more
  SpectralPlan(const std::vector<Matrix>& matrices, const std::vector<uint32_t>& names,
               int64_t probes, int64_t steps, int64_t memory);

  std::vector<SpectralEntry> entries;
  std::vector<SpectralItem> items;
  std::vector<SpectralRound> rounds;
  int64_t probes, steps;
  int64_t floats = 0;    // of the largest round
  int64_t counters = 0;  // of teams
  int32_t widest = 1;    // segments of the widest matrix: blocks of its teams
  int32_t most_items = 0;
};

}  // namespace tb::gpu
