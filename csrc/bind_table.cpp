// tbfast._native.Table.
#include <pybind11/stl.h>

#include "bind.h"
#include "bind_matrices.h"

namespace py = pybind11;

namespace tb {

Table::Table(const Array<int64_t>& descriptors, std::vector<uint32_t> names)
    : matrices_(matrices_of(descriptors, static_cast<int64_t>(names.size()))),
      names_(std::move(names)) {}

void bind_table(py::module_& m) {
  py::class_<Table>(m, "Table", "Where the matrices of a batch lie; see tbfast.Batch.")
      .def(py::init<const Array<int64_t>&, std::vector<uint32_t>>(), py::arg("descriptors"),
           py::arg("names"))
      .def("__len__", [](const Table& table) { return table.matrices().size(); });
}

}  // namespace tb
