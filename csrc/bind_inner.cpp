// tbfast._native: dot and drift.
#include "bind.h"
#include "inner.h"
#include "kernels.h"

namespace py = pybind11;

namespace tb {
namespace {

// One field of each row as an array (layers,).
template <typename Row>
Array<double> column(const std::vector<Row>& rows, double Row::* field) {
  Array<double> out(static_cast<py::ssize_t>(rows.size()));
  double* data = out.mutable_data();
  for (size_t i = 0; i < rows.size(); ++i) data[i] = rows[i].*field;
  return out;
}

void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads must be positive");
}

py::tuple dot_of_table(const Table& table, const Array<int8_t>& values, const Array<float>& scales,
                       int threads) {
  check_threads(threads);
  int64_t rows = 0, elements = 0;
  for (const Matrix& m : table.matrices()) {
    rows += m.rows;
    elements += m.rows * width(m);
  }
  if (values.size() != elements || scales.size() != rows) {
    throw py::value_error("the table has " + std::to_string(elements) + " elements in " +
                          std::to_string(rows) + " rows, the gradient has " +
                          std::to_string(values.size()) + " in " + std::to_string(scales.size()));
  }
  std::vector<InnerProduct> sums;
  {
    const py::gil_scoped_release unlocked;
    sums = dot(table.matrices(), table.layers(), values.data(), scales.data(), threads);
  }
  return py::make_tuple(column(sums, &InnerProduct::dot), column(sums, &InnerProduct::square));
}

py::tuple drift_of_table(const Table& table, const Array<int64_t>& rows, const Array<float>& values,
                         int threads) {
  check_threads(threads);
  const int64_t* kept = rows.data();
  int64_t i = 0, first = 0, elements = 0;
  for (const Matrix& m : table.matrices()) {
    for (; i < rows.size() && kept[i] >= first && kept[i] < first + m.rows; ++i) {
      if (i > 0 && kept[i] <= kept[i - 1]) throw py::value_error("rows must ascend");
      elements += width(m);
    }
    first += m.rows;
  }
  if (i != rows.size() || elements != values.size()) {
    throw py::value_error("of " + std::to_string(rows.size()) + " kept rows " + std::to_string(i) +
                          " are in the table; they have " + std::to_string(elements) +
                          " elements, the values have " + std::to_string(values.size()));
  }
  std::vector<Movement> sums;
  {
    const py::gil_scoped_release unlocked;
    sums = drift(table.matrices(), table.layers(), kept, rows.size(), values.data(), threads);
  }
  return py::make_tuple(column(sums, &Movement::moved), column(sums, &Movement::along),
                        column(sums, &Movement::size));
}

}  // namespace

void bind_inner(py::module_& m) {
  m.def("dot", &dot_of_table, py::arg("table"), py::arg("values").noconvert(),
        py::arg("scales").noconvert(), py::kw_only(), py::arg("threads"),
        "(<G, W>, |W|^2) of each layer, arrays (layers,); G = scales * values, int8.");
  m.def("drift", &drift_of_table, py::arg("table"), py::arg("rows").noconvert(),
        py::arg("values").noconvert(), py::kw_only(), py::arg("threads"),
        "(|W - W_0|^2, <W - W_0, W_0>, |W_0|^2) of each layer over its kept rows.");
}

}  // namespace tb
