// Products with W^T W and Lanczos runs on it, for every matrix of a ragged batch in one call.
// The definition is tbfast/backends/reference_lanczos.py.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "philox.h"
#include "quadrature.h"
#include "ragged.h"

namespace tb {

// Memory that runs on one table reuse: as many sets as ran at once, each as large as its largest
// matrix wanted.
class Workspaces;
std::shared_ptr<Workspaces> make_workspaces();
int64_t workspace_bytes(const Workspaces& workspaces);

// y = W^H W x, or W W^H x where that is smaller, in float32, each W read once.
//   x, y: for each matrix (probes, matrix.length()), end to end
void gram_apply(const std::vector<Matrix>& matrices, int64_t probes, const float* x, float* y,
                Workspaces& workspaces, int threads);

// Where the start vectors come from: given ones, or random signs.
struct Starts {
  int64_t probes = 0;
  std::vector<const float*> given;  // for each matrix (probes, matrix.length()), if not empty
  uint64_t seed = 0;
  uint32_t draw = 0;
  std::vector<uint32_t> names;  // by layer: CRC-32 of its name
};

// Lanczos with full reorthogonalisation: independent runs of at most `steps` steps for each start
// vector, in float32 with products summed in double across blocks. A run ends early where it has
// found an invariant subspace. A matrix that is not finite has the one entry NaN.
Tridiagonals lanczos(const std::vector<Matrix>& matrices, const Starts& starts, int64_t steps,
                     Workspaces& workspaces, int threads);

}  // namespace tb
