// tbfast._native.Table.
#include <pybind11/stl.h>

#include "bind.h"

namespace py = pybind11;

namespace tb {

Table::Table(const Array<int64_t>& descriptors, std::vector<uint32_t> names)
    : names_(std::move(names)) {
  if (descriptors.ndim() != 2 || descriptors.shape(1) != 7) {
    throw py::value_error("descriptors must have shape (matrices, 7)");
  }
  int64_t previous = -1, index = 0;
  for (py::ssize_t i = 0; i < descriptors.shape(0); ++i) {
    const int64_t* d = descriptors.data(i, 0);
    if (d[0] == 0 || d[1] < 1 || d[2] < 1 || d[5] < 0 || d[5] > 5) {
      throw py::value_error("descriptor " + std::to_string(i) + " is not a matrix");
    }
    if (d[6] < previous || d[6] >= layers()) {
      throw py::value_error("the matrices must stand in the order of their layers");
    }
    index = d[6] == previous ? index + 1 : 0;
    previous = d[6];
    matrices_.push_back({reinterpret_cast<const void*>(d[0]), d[1], d[2], d[3], d[4],
                         static_cast<DType>(d[5]), d[6], index});
  }
}

void bind_table(py::module_& m) {
  py::class_<Table>(m, "Table", "Where the matrices of a batch lie; see tbfast.Batch.")
      .def(py::init<const Array<int64_t>&, std::vector<uint32_t>>(), py::arg("descriptors"),
           py::arg("names"))
      .def("__len__", [](const Table& table) { return table.matrices().size(); });
}

}  // namespace tb
