// tbfast._cuda.FitPlan and QuadraturePlan.
#include <algorithm>
#include <memory>
#include <vector>

#include "bind_cuda.h"
#include "cuda/fit.h"

namespace py = pybind11;

namespace tb::gpu {
namespace {

FitOptions options_of(int64_t kind, double xmin_pos, double smooth, int64_t k, int64_t bins,
                      bool peak_compat, double max_alpha) {
  if (kind < 0 || kind > 3 || !(xmin_pos > 1) || k < 2 || bins < 1) {
    throw py::value_error("fit option out of range");
  }
  return {static_cast<FitKind>(kind), xmin_pos, smooth, k, bins, peak_compat, max_alpha};
}

// A table of positions that runs from 0.
std::vector<int64_t> positions(const Array<int64_t>& array, const char* name) {
  if (array.ndim() != 1 || array.size() < 1 || array.data()[0] != 0 ||
      !std::is_sorted(array.data(), array.data() + array.size())) {
    throw py::value_error(std::string(name) + " must be one-dimensional, rise and start at 0");
  }
  return {array.data(), array.data() + array.size()};
}

std::unique_ptr<FitPlan> make_fit(const Array<int64_t>& offsets, int64_t kind, double xmin_pos,
                                  double smooth, int64_t k, int64_t bins, bool peak_compat,
                                  double max_alpha) {
  return std::make_unique<FitPlan>(
      positions(offsets, "offsets"),
      options_of(kind, xmin_pos, smooth, k, bins, peak_compat, max_alpha));
}

std::unique_ptr<QuadraturePlan> make_quadrature(const Array<int64_t>& first,
                                                const Array<int64_t>& count, int64_t probes,
                                                int64_t steps, double eps, int64_t kind,
                                                double xmin_pos, double smooth, int64_t k,
                                                int64_t bins, bool peak_compat, double max_alpha) {
  const std::vector<int64_t> matrices = positions(first, "first");
  if (count.ndim() != 1 || count.size() != matrices.back()) {
    throw py::value_error("first must run from 0 to the number of matrices, the length of count");
  }
  std::vector<int64_t> counts(count.data(), count.data() + count.size());
  if (std::any_of(counts.begin(), counts.end(), [](int64_t n) { return n < 1; })) {
    throw py::value_error("count must be at least 1");
  }
  if (probes < 1 || steps < 1) throw py::value_error("probes and steps must be at least 1");
  return std::make_unique<QuadraturePlan>(
      matrices, counts, probes, steps, eps,
      options_of(kind, xmin_pos, smooth, k, bins, peak_compat, max_alpha));
}

}  // namespace

void bind_fit(py::module_& m) {
  py::class_<FitPlan>(m, "FitPlan", "Fits of many spectra in one launch; see fit.h.")
      .def(py::init(&make_fit), py::arg("offsets"), py::kw_only(), py::arg("kind"),
           py::arg("xmin_pos"), py::arg("smooth"), py::arg("k"), py::arg("bins"),
           py::arg("peak_compat"), py::arg("max_alpha"))
      .def("image", [](const FitPlan& p) { return image_array(p.image()); })
      .def_property_readonly("workspace_bytes", &FitPlan::workspace_bytes)
      .def("launch", &FitPlan::launch, py::kw_only(), py::arg("values"), py::arg("workspace"),
           py::arg("results"), py::arg("stream") = 0, py::arg("blocks") = 0,
           py::call_guard<py::gil_scoped_release>(),
           "Puts the kernel on a stream; addresses are the device's.");
  py::class_<QuadraturePlan>(m, "QuadraturePlan", "Fits of Lanczos runs in one launch; see fit.h.")
      .def(py::init(&make_quadrature), py::arg("first"), py::arg("count"), py::kw_only(),
           py::arg("probes"), py::arg("steps"), py::arg("eps"), py::arg("kind"),
           py::arg("xmin_pos"), py::arg("smooth"), py::arg("k"), py::arg("bins"),
           py::arg("peak_compat"), py::arg("max_alpha"))
      .def("image", [](const QuadraturePlan& p) { return image_array(p.image()); })
      .def_property_readonly("workspace_bytes", &QuadraturePlan::workspace_bytes)
      .def("launch", &QuadraturePlan::launch, py::kw_only(), py::arg("diagonal"),
           py::arg("off_diagonal"), py::arg("taken"), py::arg("workspace"), py::arg("results"),
           py::arg("stream") = 0, py::arg("blocks") = 0, py::call_guard<py::gil_scoped_release>(),
           "Puts the kernel on a stream; addresses are the device's.");
}

}  // namespace tb::gpu
