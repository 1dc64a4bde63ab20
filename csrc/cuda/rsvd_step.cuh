// Randomized singular value decompositions of all matrices of a ragged batch, in one launch: a
// cooperative grid that goes through all matrices in step. The definition is
// tbfast/backends/reference_rsvd.py, the algorithm to the last rule that of csrc/cpu/rsvd.cpp.
//
//   Q = A signs; what has left the safe range again, scaled by a power of two
//   for each power iteration
//     Q orthonormal;  Z = A^H Q;  Z = V R with an orthonormal V, Q <- Q R^-1
//     Q <- A V - shift Q
//   Q orthonormal;  Z = A^H Q;  Z = V R
//   R = J S W^H;  U = Q W;  V J;  alpha of the tail of S^2
//   residual: |A|^2 - |S|^2 or, where that cancels, entry by entry
//
// Phases end with a grid barrier. Which block does what changes no bit of a result: a work item and
// a matrix are each the work of one block, whose sums are in an order of their own.
#pragma once

#include "cuda/rsvd_gram.cuh"
#include "cuda/rsvd_items.cuh"
#include "cuda/rsvd_judge.cuh"

namespace tb::gpu {

// Side 0: Q = A Z - shift Q, or A times signs to begin with. Side 1: Z = A^H Q.
__device__ inline void product_phase(const RsvdArgs& a, int side, int step, unsigned char* shared) {
  const auto rescaled = [](const RsvdEntry&, const RsvdState& state) {
    return state.rescaled != 0;
  };
  // The shifted product belongs to the step before.
  const int part = side == 0 ? step + 1 : step;
  Product kind = side == 0 && step == a.iterations ? Product::signs : Product::factor;
  while (true) {
    const auto wanted = [&](const RsvdEntry& e, const RsvdState& state) {
      if (kind == Product::factor) return takes_part(e, state, part);
      return kind == Product::signs || rescaled(e, state);
    };
    const auto make = [&](const RsvdEntry& e, const RsvdState& state, RsvdItem item) {
      with_stored(e.dtype, [&](auto tag) {
        product_item<typename decltype(tag)::type>(a, e, state, item, side, kind, shared);
      });
    };
    const auto collect = [&](const RsvdEntry& e, const RsvdState& state, RsvdItem item) {
      with_scalar(e.dtype, [&](auto tag) {
        collect_item<typename decltype(tag)::type>(a, e, state, item, side, kind);
      });
    };
    for_each_item(a, a.products[side], wanted, make);
    grid_barrier();
    if (a.sliced[side]) {
      for_each_item(a, a.tiles[side], wanted, collect);
      grid_barrier();
    }
    if (kind == Product::factor) return;
    for_each_matrix(a, [&](int32_t matrix, const RsvdEntry& e, RsvdState& state) {
      if (wanted(e, state)) judge(a, matrix, e, state, kind == Product::signs);
    });
    grid_barrier();
    if (kind == Product::scaled_signs || !any(a, rescaled)) return;
    kind = Product::scaled_signs;
  }
}

// Makes the block of one side orthonormal, or of that condition number. The other side, if it
// `follows`, is multiplied by the same R^-1.
__device__ inline void orthonormalise(const RsvdArgs& a, int side, int step, double condition,
                                      bool follows, unsigned char* shared) {
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto wanted = [&](const RsvdEntry& e, const RsvdState& state) {
      return pass == 0 ? takes_part(e, state, step) : state.passes == 1;
    };
    const auto gram = [&](const RsvdEntry& e, const RsvdState&, RsvdItem item) {
      with_scalar(e.dtype, [&](auto tag) {
        gram_item<typename decltype(tag)::type>(a, e, item, side, shared);
      });
    };
    for_each_item(a, a.grams[side], wanted, gram);
    grid_barrier();
    for_each_matrix(a, [&](int32_t matrix, const RsvdEntry& e, RsvdState& state) {
      const bool takes = wanted(e, state);
      __syncthreads();
      if (!takes) {
        if (thread_index() == 0) state.passes = 0;
        return;
      }
      with_scalar(e.dtype, [&](auto tag) {
        factor<typename decltype(tag)::type>(a, e, state, side, pass, condition, shared);
      });
      if (thread_index() == 0 && pass + 1 == kPasses && state.passes == 1) {
        give_up(a, matrix, state, kInfinite, 0);
      }
    });
    grid_barrier();
    for (int other = 0; other < kSides; ++other) {
      if (other != side && !follows) continue;
      const auto factored = [](const RsvdEntry&, const RsvdState& state) {
        return state.passes != 0;
      };
      const auto apply = [&](const RsvdEntry& e, const RsvdState&, RsvdItem item) {
        with_scalar(e.dtype, [&](auto tag) {
          apply_item<typename decltype(tag)::type>(a, e, item, other, side, pass, shared);
        });
      };
      for_each_item(a, a.tiles[other], factored, apply);
    }
    grid_barrier();
    if (!any(a, [](const RsvdEntry&, const RsvdState& state) { return state.passes == 1; })) return;
  }
}

__device__ inline void shift_phase(const RsvdArgs& a, int step, unsigned char* shared) {
  for_each_matrix(a, [&](int32_t, const RsvdEntry& e, RsvdState& state) {
    if (!takes_part(e, state, step)) return;
    with_scalar(e.dtype, [&](auto tag) {
      find_shift<typename decltype(tag)::type>(a, e, state, step, shared);
    });
  });
  grid_barrier();
}

__device__ inline void decompose_phase(const RsvdArgs& a, unsigned char* shared) {
  for_each_matrix(a, [&](int32_t matrix, const RsvdEntry& e, RsvdState& state) {
    if (state.alive == 0) return;
    with_scalar(e.dtype, [&](auto tag) {
      conclude<typename decltype(tag)::type>(a, matrix, e, state, shared);
    });
  });
  grid_barrier();
  const auto wanted = [](const RsvdEntry&, const RsvdState& state) { return state.alive != 0; };
  for (int side = 0; side < kSides; ++side) {
    for_each_item(a, a.tiles[side], wanted,
                  [&](const RsvdEntry& e, const RsvdState&, RsvdItem item) {
                    with_scalar(e.dtype, [&](auto tag) {
                      write_item<typename decltype(tag)::type>(a, e, item, side, shared);
                    });
                  });
  }
  grid_barrier();
}

__device__ inline void residual_phase(const RsvdArgs& a) {
  const auto cancelled = [](const RsvdEntry&, const RsvdState& state) {
    return state.alive != 0 && state.cancelled != 0;
  };
  if (!any(a, cancelled)) return;
  for_each_item(a, a.tiles[0], cancelled,
                [&](const RsvdEntry& e, const RsvdState& state, RsvdItem item) {
                  with_stored(e.dtype, [&](auto tag) {
                    residual_item<typename decltype(tag)::type>(a, e, state, item);
                  });
                });
  grid_barrier();
  for_each_matrix(a, [&](int32_t matrix, const RsvdEntry& e, RsvdState& state) {
    if (!cancelled(e, state)) return;
    double left = 0;
    for (int64_t tile = thread_index(); tile < e.side[0].tiles; tile += kThreads) {
      left += at<double>(a, e.sums)[tile];
    }
    left = block_sum(left);
    if (thread_index() == 0) a.results[matrix * kRsvdResults] = sqrt(left / state.square);
  });
}

// The kernel. Two blocks on a multiprocessor hide each other's barriers.
__global__ void __launch_bounds__(kThreads, kWantedBlocks)
    rsvd_step(const __grid_constant__ RsvdArgs a) {
  TB_DYNAMIC_SHARED(unsigned char, shared);
  // Condition number up to which one more CholeskyQR gives a basis good enough to multiply with,
  // and one that is orthonormal to rounding.
  constexpr double kUsable = 1e5, kOrthonormal = 4;
  for (int step = a.iterations; step >= 0; --step) {
    for (int side = 0; side < kSides; ++side) {
      const bool iterates = side == 1 && step > 0;
      product_phase(a, side, step, shared);
      orthonormalise(a, side, step, iterates ? kUsable : kOrthonormal, iterates, shared);
      if (iterates) shift_phase(a, step, shared);
    }
  }
  decompose_phase(a, shared);
  residual_phase(a);
}

}  // namespace tb::gpu
