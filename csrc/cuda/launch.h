// Launches of cooperative kernels, which take one struct of arguments. For the files that define
// kernels.
#pragma once

#include <cstdint>

#include "cuda/device.h"

#if defined(__CUDACC__)
#include <stdexcept>
#include <string>

namespace tb::gpu {

void count_launch();

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Blocks of this kernel that fit on the current device at once.
template <typename Args>
int resident_blocks(void (*kernel)(Args), int64_t shared) {
  int current = 0, multiprocessors = 0, each = 0;
  const auto bytes = static_cast<int>(shared);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory of a kernel");
  check(cudaGetDevice(&current), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current),
        "number of multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads,
                                                      static_cast<size_t>(shared)),
        "occupancy of a kernel");
  return multiprocessors * each;
}

// Puts the kernel on a stream and returns. `resident_blocks` must have been asked once before, with
// as much shared memory, for the current device.
template <typename Args>
void launch(void (*kernel)(Args), int blocks, int64_t shared, Args args, uintptr_t stream) {
  void* arguments[] = {&args};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                    dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                                    static_cast<size_t>(shared),
                                    reinterpret_cast<cudaStream_t>(stream)),
        "launch of a kernel");
  count_launch();
}

}  // namespace tb::gpu
#else
#include "emulated_runtime.h"
#endif
