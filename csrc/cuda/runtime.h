// The CUDA runtime as the rest sees it. The emulator has a runtime of its own, with devices that
// tests make up.
#pragma once

#include <cstdint>
#include <string>

namespace tb::gpu {

struct Device {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t shared_per_block = 0;  // bytes a block may ask for
  bool cooperative = false;      // can launch grids whose blocks wait for each other
};

// Number of devices; 0 where there is no driver, and then why.
int device_count(std::string* reason);

// Throws std::runtime_error in the driver's words.
Device device(int index);

// Kernels launched by this process.
int64_t launch_count();

}  // namespace tb::gpu
