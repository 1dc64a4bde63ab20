// How the grid goes through matrices and work items: in turn, with the code for the type of each.
#pragma once

#include "cuda/rsvd_tile.cuh"

namespace tb::gpu {

template <typename T>
struct Tag {
  using type = T;
};

// Calls task(Tag<how weights are stored>) or task(Tag<the scalar they become>).
template <typename Task>
__device__ inline void with_stored(DType dtype, Task task) {
  switch (dtype) {
    case DType::f16:
      return task(Tag<__half>{});
    case DType::bf16:
      return task(Tag<__nv_bfloat16>{});
    case DType::f32:
      return task(Tag<float>{});
    case DType::f64:
      return task(Tag<double>{});
    case DType::c64:
      return task(Tag<float2>{});
    default:
      return task(Tag<double2>{});
  }
}
template <typename Task>
__device__ inline void with_scalar(DType dtype, Task task) {
  switch (dtype) {
    case DType::f64:
      return task(Tag<double>{});
    case DType::c64:
      return task(Tag<Complex<float>>{});
    case DType::c128:
      return task(Tag<Complex<double>>{});
    default:
      return task(Tag<float>{});
  }
}

// Calls task(entry, state, item) for the wanted work items that are this block's turn.
template <typename Wanted, typename Task>
__device__ inline void for_each_item(const RsvdArgs& a, const RsvdTable& table, Wanted wanted,
                                     Task task) {
  for (auto i = static_cast<int32_t>(blockIdx.x); i < table.count;
       i += static_cast<int32_t>(gridDim.x)) {
    const RsvdItem item = table.items[i];
    const RsvdEntry& e = a.entries[item.matrix];
    const RsvdState& state = a.states[item.matrix];
    if (wanted(e, state)) task(e, state, item);
  }
}

// Calls task(index, entry, state) for the matrices that are this block's turn.
template <typename Task>
__device__ inline void for_each_matrix(const RsvdArgs& a, Task task) {
  for (auto i = static_cast<int32_t>(blockIdx.x); i < a.matrices;
       i += static_cast<int32_t>(gridDim.x))
    task(i, a.entries[i], a.states[i]);
}

// Whether `property` holds for any matrix; the same on every block.
template <typename Property>
__device__ inline bool any(const RsvdArgs& a, Property property) {
  bool found = false;
  for (int32_t i = thread_index(); i < a.matrices; i += kThreads) {
    found = found || property(a.entries[i], a.states[i]);
  }
  return __syncthreads_or(found) != 0;
}

// Whether a matrix takes part in what is done with `step` power iterations to go.
__device__ inline bool takes_part(const RsvdEntry& e, const RsvdState& state, int step) {
  return state.alive != 0 && (step == 0 || e.iterates != 0);
}

// For one thread: what is said of a matrix that has no factors.
__device__ inline void give_up(const RsvdArgs& a, int32_t matrix, RsvdState& state, double reason,
                               int reads) {
  double* result = a.results + matrix * kRsvdResults;
  result[0] = reason;
  result[1] = nan("");
  result[2] = reads;
  state.alive = state.passes = 0;
}

}  // namespace tb::gpu
