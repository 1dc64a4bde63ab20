// tbfast._cuda.SpectralPlan.
#include <pybind11/stl.h>

#include <memory>

#include "bind_cuda.h"
#include "bind_matrices.h"
#include "cuda/spectral_step.h"

namespace py = pybind11;

namespace tb::gpu {
namespace {

std::unique_ptr<SpectralStep> make_plan(const Array<int64_t>& descriptors,
                                        const std::vector<uint32_t>& names, int64_t probes,
                                        int64_t steps, int64_t memory, int64_t kind,
                                        double xmin_pos, double smooth, int64_t k, int64_t bins,
                                        bool peak_compat, double max_alpha) {
  if (probes < 1 || probes > 8192 || steps < 1 || steps > 1000 || kind < 0 || kind > 3 ||
      !(xmin_pos > 1) || k < 2 || bins < 1) {
    throw py::value_error("option out of range");
  }
  const FitOptions options{
      static_cast<FitKind>(kind), xmin_pos, smooth, k, bins, peak_compat, max_alpha};
  return std::make_unique<SpectralStep>(
      matrices_of(descriptors, static_cast<int64_t>(names.size())), names, probes, steps, options,
      memory);
}

void launch_plan(const SpectralStep& plan, uintptr_t workspace, const std::string& mode,
                 uintptr_t given, uintptr_t out, uint64_t seed, uint32_t draw, bool replayed,
                 uintptr_t finished, double sequence, uintptr_t stream, int64_t blocks) {
  SpectralCall call;
  call.product = mode == "product";
  call.fit = mode == "alpha";
  if (!call.product && !call.fit && mode != "lanczos") {
    throw py::value_error("mode must be product, lanczos or alpha");
  }
  call.given = given;
  call.out = out;
  call.seed = seed;
  call.draw = draw;
  call.replayed = replayed;
  call.finished = finished;
  call.sequence = sequence;
  const py::gil_scoped_release unlocked;
  plan.launch(call, workspace, stream, blocks);
}

}  // namespace

void bind_spectral(py::module_& m) {
  py::class_<SpectralStep>(m, "SpectralPlan", "One launch for all layers; see spectral_step.h.")
      .def(py::init(&make_plan), py::arg("descriptors"), py::arg("names"), py::kw_only(),
           py::arg("probes"), py::arg("steps"), py::arg("memory"), py::arg("kind"),
           py::arg("xmin_pos"), py::arg("smooth"), py::arg("k"), py::arg("bins"),
           py::arg("peak_compat"), py::arg("max_alpha"))
      .def("image", [](const SpectralStep& p) { return image_array(p.image()); })
      .def_property_readonly("workspace_bytes", &SpectralStep::workspace_bytes)
      .def_property_readonly("diagonal", &SpectralStep::diagonal)
      .def_property_readonly("off_diagonal", &SpectralStep::off_diagonal)
      .def_property_readonly("taken", &SpectralStep::taken)
      .def_property_readonly("least_blocks", &SpectralStep::least_blocks)
      .def_property_readonly("most_blocks", &SpectralStep::most_blocks)
      .def("launch", &launch_plan, py::kw_only(), py::arg("workspace"), py::arg("mode"),
           py::arg("given") = 0, py::arg("out") = 0, py::arg("seed") = 0, py::arg("draw") = 0,
           py::arg("replayed") = false, py::arg("finished") = 0, py::arg("sequence") = 0.0,
           py::arg("stream") = 0, py::arg("blocks") = 0,
           "Puts the kernel on a stream; addresses are the device's.");
}

}  // namespace tb::gpu
