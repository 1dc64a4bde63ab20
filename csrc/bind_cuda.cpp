// tbfast._cuda: the GPU kernels. The tests build the same file with the emulator's runtime.
#include "bind_cuda.h"

#include <pybind11/stl.h>

#include <string>

#include "cuda/runtime.h"

#if defined(TB_EMULATED)
#include "emulated_runtime.h"
#include "simt_instructions.h"
#define TB_MODULE _cuda_emulated
#else
#define TB_MODULE _cuda
#endif

namespace py = pybind11;

namespace tb::gpu {
namespace {

py::dict device_dict(int index) {
  const Device d = device(index);
  py::dict found;
  found["name"] = d.name;
  found["major"] = d.major;
  found["minor"] = d.minor;
  found["multiprocessors"] = d.multiprocessors;
  found["shared_per_block"] = d.shared_per_block;
  found["cooperative"] = d.cooperative;
  return found;
}

py::tuple count_devices() {
  std::string reason;
  const int count = device_count(&reason);
  return py::make_tuple(count, reason);
}

// What the kernels were compiled for, e.g. "sm_80 sm_90 compute_90".
const char* targets() {
#if defined(TB_CUDA_TARGETS)
  return TB_CUDA_TARGETS;
#else
  return "";
#endif
}

// Of the compiler and the runtime that is linked in.
const char* cuda_version() {
#if defined(TB_CUDA_VERSION)
  return TB_CUDA_VERSION;
#else
  return "";
#endif
}

#if defined(TB_EMULATED)
void emulate(uint64_t schedule, int multiprocessors, int blocks_per_multiprocessor) {
  Emulation& e = emulation();
  e.schedule = schedule;
  e.device.multiprocessors = multiprocessors;
  e.blocks_per_multiprocessor = blocks_per_multiprocessor;
}
#endif

}  // namespace
}  // namespace tb::gpu

PYBIND11_MODULE(TB_MODULE, m) {
  using namespace tb::gpu;
  m.doc() = "GPU kernels of tbfast; see csrc/cuda.";
  m.def("device_count", &count_devices, "Number of devices, and why it is 0 if it is.");
  m.def("device", &device_dict, py::arg("index"), "What the driver says of a device.");
  m.def("launch_count", &launch_count, "Kernels launched by this process.");
  m.def("targets", &targets, "Architectures that the kernels were compiled for.");
  m.def("cuda_version", &cuda_version, "Version of CUDA that they were compiled with.");
  // torch's word for where the addresses that the kernels are given lie
#if defined(TB_EMULATED)
  m.attr("device_type") = "cpu";
#else
  m.attr("device_type") = "cuda";
#endif
  bind_spectral(m);
  bind_fit(m);
  bind_rsvd(m);
  bind_inner(m);
#if defined(TB_EMULATED)
  m.def("emulate", &emulate, py::arg("schedule") = 0, py::arg("multiprocessors") = 3,
        py::arg("blocks_per_multiprocessor") = 1, "How the emulator runs the next launches.");
  m.def("weight_bytes", [] { return simt::counters().weight_bytes; });
#endif
}
