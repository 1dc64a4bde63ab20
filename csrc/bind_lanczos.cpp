// gram_apply and lanczos of a Table.
#include <pybind11/stl.h>

#include <optional>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;

namespace tb {
namespace {

int64_t total_length(const Table& table) {
  int64_t total = 0;
  for (const Matrix& m : table.matrices()) total += m.length();
  return total;
}

Array<float> apply(const Table& table, const Array<float>& x, int64_t probes, int threads) {
  if (probes < 1 || x.ndim() != 1 || x.size() != probes * total_length(table)) {
    throw py::value_error("x must hold (probes, length) numbers for each matrix, end to end");
  }
  Array<float> y(x.size());
  float* out = y.mutable_data();
  const py::gil_scoped_release unlocked;
  gram_apply(table.matrices(), probes, x.data(), out, table.workspaces(), threads);
  return y;
}

Starts checked_starts(const Table& table, int64_t probes, int64_t steps, uint64_t seed,
                      uint32_t draw, const std::optional<Array<float>>& given) {
  if (probes < 1 || probes > 8192 || steps < 1 || draw >= 1u << 24) {
    throw py::value_error("probes must be 1 to 8192, steps 1 or more, draw below 2^24");
  }
  Starts starts{probes, {}, seed, draw, table.names()};
  if (given) {
    if (given->ndim() != 1 || given->size() != probes * total_length(table)) {
      throw py::value_error("starts must hold (probes, length) numbers for each matrix");
    }
    const float* next = given->data();
    for (const Matrix& m : table.matrices()) {
      starts.given.push_back(next);
      next += probes * m.length();
    }
  }
  return starts;
}

py::tuple run_lanczos(const Table& table, int64_t probes, int64_t steps, uint64_t seed,
                      uint32_t draw, const std::optional<Array<float>>& given, int threads) {
  const Starts starts = checked_starts(table, probes, steps, seed, draw, given);
  Tridiagonals runs;
  {
    const py::gil_scoped_release unlocked;
    runs = lanczos(table.matrices(), starts, steps, table.workspaces(), threads);
  }
  const auto matrices = static_cast<py::ssize_t>(table.matrices().size());
  return py::make_tuple(
      as_array(std::move(runs.diagonal), {matrices, probes, steps}),
      as_array(std::move(runs.off_diagonal), {matrices, probes, steps}),
      as_array(std::move(runs.taken), {matrices, probes}),
      as_array(std::move(runs.first), {static_cast<py::ssize_t>(table.layers()) + 1}),
      as_array(std::move(runs.count), {matrices}), runs.eps.empty() ? 0 : runs.eps[0]);
}

}  // namespace

void bind_lanczos(py::module_& m) {
  m.def("gram_apply", &apply, py::arg("table"), py::arg("x"), py::kw_only(), py::arg("probes"),
        py::arg("threads"),
        "W^H W x of every matrix; x and the result flat, (probes, length) each.");
  m.def("lanczos", &run_lanczos, py::arg("table"), py::kw_only(), py::arg("probes"),
        py::arg("steps"), py::arg("seed"), py::arg("draw"), py::arg("starts"), py::arg("threads"),
        "Jacobi matrices: diagonals and off-diagonals (matrices, probes, steps), steps taken.");
  m.def("workspace_bytes", [](const Table& t) { return workspace_bytes(t.workspaces()); });
}

}  // namespace tb
