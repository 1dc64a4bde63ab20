// Small kernels, each with a fault that the emulator or a sanitizer must find, and each without it:
// template <bool kFault>. They run in two blocks, and every thread is to write 42.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "cuda/block.h"
#include "cuda/instructions.h"

namespace planted {

using tb::gpu::grid_barrier;

constexpr unsigned kThreads = 64, kBlocks = 2, kFull = 0xffffffffu;

// Where the running thread writes.
__device__ inline float& mine(float* out) { return out[blockIdx.x * kThreads + threadIdx.x]; }

// Needs the barrier between the leader's write and what the others read.
template <bool kFault>
__global__ void missing_barrier(float* out, int*) {
  TB_SHARED(float, value, [1]);
  if (threadIdx.x == 0) value[0] = 42;
  if (!kFault) __syncthreads();
  mine(out) = value[0];
}

// Needs a second barrier: the leader may overwrite what others have not read yet.
template <bool kFault>
__global__ void missing_second_barrier(float* out, int*) {
  TB_SHARED(float, value, [1]);
  for (int round = 0; round < 8; ++round) {
    if (threadIdx.x == 0) value[0] = static_cast<float>(round);
    __syncthreads();
    mine(out) = round == 7 || value[0] == static_cast<float>(round) ? 42 : -1;
    if (mine(out) < 0) return;
    if (!kFault) __syncthreads();
  }
}

template <bool kFault>
__global__ void missing_warp_barrier(float* out, int*) {
  TB_SHARED(float, values, [kThreads]);
  const unsigned neighbour = threadIdx.x ^ 1;
  values[threadIdx.x] = 42;
  if (!kFault) __syncwarp();
  mine(out) = values[neighbour];
}

template <bool kFault>
__global__ void missing_grid_barrier(float* out, int* words) {
  if (blockIdx.x == 0 && threadIdx.x == 0) words[1] = 42;
  if (!kFault) grid_barrier();
  mine(out) = static_cast<float>(words[1]);
}

// One block hands a number to the other and raises a flag, twice; the second time without a fence.
template <bool kFault>
__global__ void missing_fence(float* out, int* words) {
  mine(out) = 42;
  for (int round = 1; round <= 2; ++round) {
    if (threadIdx.x == 0 && blockIdx.x == 0) {
      words[round] = 42;
      if (!kFault || round == 1) __threadfence();
      atomicExch(words, round);
    } else if (threadIdx.x == 0) {
      while (atomicAdd(words, 0) < round) TB_SPIN();
      __threadfence();
      mine(out) = static_cast<float>(words[round]);
    }
    __syncthreads();
  }
}

template <bool kFault>
__global__ void static_shared_overrun(float* out, int*) {
  TB_SHARED(float, values, [kThreads]);
  values[threadIdx.x + (kFault ? 1 : 0)] = 42;
  __syncthreads();
  mine(out) = values[threadIdx.x];
}

// Dynamic memory for as many floats as there are threads.
template <bool kFault>
__global__ void dynamic_shared_overrun(float* out, int*) {
  TB_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + (kFault ? 1 : 0)] = 42;
  __syncthreads();
  mine(out) = values[threadIdx.x];
}

template <bool kFault>
__global__ void global_overrun(float* out, int*) {
  mine(out) = 42;
  if (kFault && threadIdx.x == 0) out[kBlocks * kThreads] = 42;
}

template <bool kFault>
__global__ void divergent_barrier(float* out, int*) {
  if (kFault && threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  mine(out) = 42;
}

template <bool kFault>
__global__ void returned_before_barrier(float* out, int*) {
  mine(out) = 42;
  if (kFault && threadIdx.x == 40) return;
  __syncthreads();
}

template <bool kFault>
__global__ void divergent_warp(float* out, int*) {
  if (kFault && threadIdx.x % 32 < 16) {
    __any_sync(kFull, 1);
  } else {
    __shfl_sync(kFull, 1, 0);
  }
  mine(out) = 42;
}

// Lane 3 waits for lane 9, which waits for the block.
template <bool kFault>
__global__ void deadlock(float* out, int*) {
  if (!kFault || threadIdx.x == 3) __shfl_sync(kFault ? 0x208u : kFull, 1, 9);
  __syncthreads();
  mine(out) = 42;
}

template <bool kFault>
__global__ void livelock(float* out, int* words) {
  atomicAdd(words, 1);
  const int all = static_cast<int>(kThreads * kBlocks) + (kFault ? 1 : 0);
  while (atomicAdd(words, 0) < all) TB_SPIN();
  mine(out) = 42;
}

// Takes so many bytes of the stack, by frames of 1 KiB, and waits for the block there.
__device__ inline char descend(const char* top, std::ptrdiff_t bytes) {
  volatile char frame[1024];
  const auto* here = static_cast<const char*>(__builtin_frame_address(0));
  frame[bytes % 1024] = 1;
  if (top - here < bytes) return static_cast<char>(descend(top, bytes) + frame[bytes % 1024]);
  __syncthreads();
  return 0;
}

// A stack has 256 KiB, of which the last 16 are not to be used.
template <bool kFault>
__global__ void stack_overflow(float* out, int*) {
  descend(static_cast<const char*>(__builtin_frame_address(0)), (kFault ? 241 : 200) << 10);
  mine(out) = 42;
}

template <bool kFault>
__global__ void missing_copy_wait(float* out, int* words) {
  TB_SHARED(float, values, [4 * kThreads]);
  const float* from = reinterpret_cast<const float*>(words) + 4;  // four times 42
  tb::gpu::cp_async_16(&values[4 * threadIdx.x], from, 16);
  tb::gpu::cp_async_commit();
  tb::gpu::cp_async_16(&values[4 * threadIdx.x], from, 8);
  tb::gpu::cp_async_commit();
  tb::gpu::cp_async_wait<kFault ? 1 : 0>();
  const float* copied = &values[4 * threadIdx.x];
  mine(out) = copied[1] == 42 && copied[2] == 0 ? 42 : -1;  // the rest of 16 bytes is zero
}

template <bool kFault>
__global__ void misaligned_copy(float* out, int* words) {
  TB_SHARED(float, values, [4 * kThreads]);
  const float* from = reinterpret_cast<const float*>(words) + (kFault ? 3 : 4);
  tb::gpu::cp_async_16(&values[4 * threadIdx.x], from, 4);
  tb::gpu::cp_async_commit();
  tb::gpu::cp_async_wait<0>();
  mine(out) = values[4 * threadIdx.x];
}

// One element is never written.
template <bool kFault>
__global__ void unwritten_shared(float* out, int*) {
  TB_SHARED(float, values, [kThreads]);
  if (!kFault || threadIdx.x != 7) values[threadIdx.x] = 42;
  __syncthreads();
  mine(out) = values[threadIdx.x];
}

struct Kernel {
  const char* name;
  void (*faulty)(float*, int*);
  void (*sound)(float*, int*);
};

#define PLANTED(name) {#name, name<true>, name<false>}
constexpr Kernel kKernels[] = {
    PLANTED(missing_barrier),
    PLANTED(missing_second_barrier),
    PLANTED(missing_warp_barrier),
    PLANTED(missing_grid_barrier),
    PLANTED(missing_fence),
    PLANTED(static_shared_overrun),
    PLANTED(dynamic_shared_overrun),
    PLANTED(global_overrun),
    PLANTED(divergent_barrier),
    PLANTED(returned_before_barrier),
    PLANTED(divergent_warp),
    PLANTED(deadlock),
    PLANTED(livelock),
    PLANTED(stack_overflow),
    PLANTED(missing_copy_wait),
    PLANTED(misaligned_copy),
    PLANTED(unwritten_shared),
};
#undef PLANTED

// "right", "wrong", or the fault that was found.
inline std::string outcome(void (*kernel)(float*, int*), uint64_t seed) {
  constexpr unsigned kAll = kBlocks * kThreads;
  const std::unique_ptr<float[]> out(new float[kAll]);  // of exact size
  for (unsigned i = 0; i < kAll; ++i) out[i] = NAN;
  alignas(16) int words[8] = {};
  for (int i = 4; i < 8; ++i) words[i] = __float_as_int(42);
  simt::Options options;
  options.seed = seed;
  options.most_spins = 100000;
  try {
    SIMT_LAUNCH(kernel, dim3(kBlocks), dim3(kThreads), kThreads * sizeof(float), options, out.get(),
                words);
  } catch (const simt::fault& fault) {
    return fault.what();
  }
  for (unsigned i = 0; i < kAll; ++i) {
    if (!(out[i] == 42)) return "wrong";
  }
  return "right";
}

}  // namespace planted
