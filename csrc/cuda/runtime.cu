#include "cuda/runtime.h"

#include <atomic>

#include "cuda/launch.h"

namespace tb::gpu {
namespace {

std::atomic<int64_t> launches{0};

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "attribute of a device");
  return value;
}

}  // namespace

void count_launch() { ++launches; }
int64_t launch_count() { return launches; }

int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  if (reason != nullptr) *reason = cudaGetErrorString(error);
  return 0;
}

Device device(int index) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "properties of a device");
  Device found;
  found.name = properties.name;
  found.major = properties.major;
  found.minor = properties.minor;
  found.multiprocessors = properties.multiProcessorCount;
  found.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  found.cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  return found;
}

}  // namespace tb::gpu
