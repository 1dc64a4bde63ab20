// What the spectral kernel is given: tables, the memory it works in, and where results go. Pointers
// are the device's.
#pragma once

#include <cstdint>

#include "cuda/quadrature.h"
#include "cuda/spectral_plan.h"

namespace tb::gpu {

enum class SpectralMode : int32_t {
  product,  // A x of given vectors
  lanczos,  // Jacobi matrices
  alpha,    // and from them alpha of every layer
};

struct SpectralArgs {
  const SpectralEntry* entries;
  const SpectralItem* items;
  const SpectralRound* rounds;
  int32_t round_count;
  SpectralMode mode;
  int64_t steps;

  float* floats;      // vectors of one round
  unsigned* arrived;  // counters of teams
  int32_t* going;     // (runs): 1 until the run ends
  double* scale;      // (entries): power of two that W is multiplied by

  const float* given;  // start vectors (probes, length) for each matrix; null: random signs
  float* products;     // A x, likewise
  uint64_t seed;
  uint32_t draw;
  uint32_t* replays;  // null, or a counter that is added to `draw` and then raised: for CUDA graphs

  double* diagonal;      // (runs, steps)
  double* off_diagonal;  // (runs, steps)
  int32_t* taken;        // (runs)

  QuadratureArgs quadrature;
  double* finished;  // null, or what `sequence` is written to when all results are there
  double sequence;
};

}  // namespace tb::gpu
