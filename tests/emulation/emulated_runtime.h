// The runtime of cuda/launch.h and cuda/runtime.h on the emulator: kernels run when they are
// launched, one after the other, on a device that a test makes up.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/runtime.h"

namespace tb::gpu {

struct Emulation {
  uint64_t schedule = 0;  // 0: threads take turns in order; else at random, from this seed
  int blocks_per_multiprocessor = 1;
  int64_t launches = 0;
  Device device{"emulated", 9, 0, 3, 227 << 10, true};
};

inline Emulation& emulation() {
  static Emulation state;
  return state;
}

template <typename Args>
int resident_blocks(void (*)(Args), int64_t shared) {
  const Emulation& e = emulation();
  if (shared > e.device.shared_per_block) throw std::runtime_error("too much shared memory");
  return e.device.multiprocessors * e.blocks_per_multiprocessor;
}

template <typename Args>
void launch(void (*kernel)(Args), int blocks, int64_t shared, Args args, uintptr_t) {
  simt::Options options;
  options.seed = emulation().schedule;
  ++emulation().launches;
  SIMT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
              static_cast<size_t>(shared), options, args);
}

}  // namespace tb::gpu
