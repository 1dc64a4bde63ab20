// tbfast._cuda.RsvdPlan.
#include <algorithm>
#include <memory>

#include "bind_cuda.h"
#include "bind_matrices.h"
#include "cuda/rsvd_step.h"

namespace py = pybind11;

namespace tb::gpu {
namespace {

std::unique_ptr<RsvdStep> make_plan(const Array<int64_t>& descriptors, int64_t rank,
                                    int64_t oversample, int64_t power_iters) {
  if (rank < 1 || oversample < 0 || power_iters < 0 || power_iters > 1000) {
    throw py::value_error("rsvd option out of range");
  }
  const py::ssize_t count = descriptors.ndim() == 2 ? descriptors.shape(0) : 0;
  const bool described = count > 0 && descriptors.shape(1) == 7;
  const int64_t layers = described ? *descriptors.data(count - 1, 6) + 1 : 0;
  return std::make_unique<RsvdStep>(matrices_of(descriptors, layers),
                                    RsvdOptions{rank, oversample, power_iters, 0});
}

Array<int64_t> offsets(const RsvdStep& plan) {
  Array<int64_t> found({static_cast<py::ssize_t>(plan.entries().size()), py::ssize_t{3}});
  int64_t* to = found.mutable_data();
  for (const RsvdEntry& e : plan.entries()) to = std::copy(e.out, e.out + 3, to);
  return found;
}

void launch_plan(const RsvdStep& plan, uintptr_t workspace, uintptr_t factors, uintptr_t results,
                 uint64_t seed, uintptr_t stream, int64_t blocks) {
  const py::gil_scoped_release unlocked;
  plan.launch(workspace, factors, results, seed, stream, blocks);
}

}  // namespace

void bind_rsvd(py::module_& m) {
  py::class_<RsvdStep>(m, "RsvdPlan", "Factors of all matrices in one launch; see rsvd_step.h.")
      .def(py::init(&make_plan), py::arg("descriptors"), py::kw_only(), py::arg("rank"),
           py::arg("oversample"), py::arg("power_iters"))
      .def("image", [](const RsvdStep& p) { return image_array(p.image()); })
      .def_property_readonly("workspace_bytes", &RsvdStep::workspace_bytes)
      .def_property_readonly("factors_bytes", &RsvdStep::factors_bytes)
      .def_property_readonly("offsets", &offsets,
                             "(matrices, 3): where U, S and Vh begin, in bytes.")
      .def_property_readonly("most_blocks", &RsvdStep::most_blocks)
      .def("launch", &launch_plan, py::kw_only(), py::arg("workspace"), py::arg("factors"),
           py::arg("results"), py::arg("seed") = 0, py::arg("stream") = 0, py::arg("blocks") = 0,
           "Puts the kernel on a stream; addresses are the device's.");
}

}  // namespace tb::gpu
