// tbfast._cuda.DotPlan and DriftPlan.
#include <pybind11/stl.h>

#include <memory>

#include "bind_cuda.h"
#include "bind_matrices.h"
#include "cuda/inner_step.h"

namespace py = pybind11;

namespace tb::gpu {
namespace {

std::unique_ptr<DotPlan> make_dot(const Array<int64_t>& descriptors, int64_t layers) {
  return std::make_unique<DotPlan>(matrices_of(descriptors, layers), layers);
}

std::unique_ptr<DriftPlan> make_drift(const Array<int64_t>& descriptors, int64_t layers,
                                      const std::vector<int64_t>& rows) {
  return std::make_unique<DriftPlan>(matrices_of(descriptors, layers), layers, rows);
}

void launch_dot(const DotPlan& plan, uintptr_t values, uintptr_t scales, uintptr_t workspace,
                uintptr_t results, uintptr_t stream, int64_t blocks) {
  const py::gil_scoped_release unlocked;
  plan.launch(values, scales, workspace, results, stream, blocks);
}

void launch_drift(const DriftPlan& plan, uintptr_t values, uintptr_t workspace, uintptr_t results,
                  uintptr_t stream, int64_t blocks) {
  const py::gil_scoped_release unlocked;
  plan.launch(values, workspace, results, stream, blocks);
}

// What the two plans have in common.
template <typename Plan>
py::class_<Plan> define(py::module_& m, const char* name, const char* text, int columns) {
  py::class_<Plan> type(m, name, text);
  type.def("image", [](const Plan& p) { return image_array(p.image()); })
      .def_property_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_property_readonly("most_blocks", &Plan::most_blocks);
  type.attr("columns") = columns;
  return type;
}

}  // namespace

void bind_inner(py::module_& m) {
  define<DotPlan>(m, "DotPlan", "<G, W> and |W|^2 of all layers in one launch; see inner_step.h.",
                  kDotColumns)
      .def(py::init(&make_dot), py::arg("descriptors"), py::arg("layers"))
      .def("launch", &launch_dot, py::kw_only(), py::arg("values"), py::arg("scales"),
           py::arg("workspace"), py::arg("results"), py::arg("stream") = 0, py::arg("blocks") = 0,
           "Puts the kernel on a stream; addresses are the device's.");
  define<DriftPlan>(m, "DriftPlan", "Movement of all layers in one launch; see inner_step.h.",
                    kDriftColumns)
      .def(py::init(&make_drift), py::arg("descriptors"), py::arg("layers"), py::arg("rows"))
      .def("launch", &launch_drift, py::kw_only(), py::arg("values"), py::arg("workspace"),
           py::arg("results"), py::arg("stream") = 0, py::arg("blocks") = 0,
           "Puts the kernel on a stream; addresses are the device's.");
}

}  // namespace tb::gpu
