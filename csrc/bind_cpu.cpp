// tbfast._native: checks arguments, releases the GIL, calls the kernels.
#include <pybind11/complex.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

template <typename T>
using In = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T, typename Field>
py::array_t<T> column(const std::vector<tb::Fit>& table, Field field) {
  py::array_t<T> out(static_cast<py::ssize_t>(table.size()));
  T* data = out.mutable_data();
  for (size_t i = 0; i < table.size(); ++i) data[i] = static_cast<T>(field(table[i]));
  return out;
}

py::tuple fit(const In<double>& values, const In<int64_t>& offsets, int64_t kind, double xmin_pos,
              double smooth, int64_t k, int64_t bins, bool peak_compat, double max_alpha,
              int threads) {
  if (values.ndim() != 1 || offsets.ndim() != 1 || offsets.size() < 1) {
    throw py::value_error("values and offsets must be one-dimensional, offsets not empty");
  }
  const int64_t rows = offsets.size() - 1;
  const int64_t* bounds = offsets.data();
  for (int64_t row = 0; row < rows; ++row) {
    if (bounds[row] > bounds[row + 1]) throw py::value_error("offsets must not decrease");
  }
  if (bounds[0] != 0 || bounds[rows] != values.size()) {
    throw py::value_error("offsets must run from 0 to the number of values");
  }
  if (kind < 0 || kind > 3 || !(xmin_pos > 1) || k < 2 || bins < 1 || threads < 1) {
    throw py::value_error("fit option out of range");
  }
  const tb::FitOptions options{
      static_cast<tb::FitKind>(kind), xmin_pos, smooth, k, bins, peak_compat, max_alpha};
  std::vector<tb::Fit> table;
  {
    const py::gil_scoped_release unlocked;
    table = tb::fit(values.data(), bounds, rows, options, threads);
  }
  return py::make_tuple(column<double>(table, [](const tb::Fit& f) { return f.alpha; }),
                        column<double>(table, [](const tb::Fit& f) { return f.xmin; }),
                        column<double>(table, [](const tb::Fit& f) { return f.ks; }),
                        column<int64_t>(table, [](const tb::Fit& f) { return f.start; }),
                        column<int64_t>(table, [](const tb::Fit& f) { return f.n_tail; }),
                        column<int64_t>(table, [](const tb::Fit& f) { return f.reason; }));
}

template <typename T>
py::array_t<double> eigenvalues(const py::array_t<T, py::array::c_style>& a,
                                void (*compute)(const T*, int64_t, int64_t, double*)) {
  if (a.ndim() != 3 || a.shape(1) != a.shape(2)) {
    throw py::value_error("matrices must have shape (count, n, n)");
  }
  py::array_t<double> out({a.shape(0), a.shape(1)});
  double* values = out.mutable_data();
  const py::gil_scoped_release unlocked;
  compute(a.data(), a.shape(0), a.shape(1), values);
  return out;
}

template <typename T>
py::array_t<double> symmetric_eigenvalues(const py::array_t<T, py::array::c_style>& a) {
  return eigenvalues(a, &tb::symmetric_eigenvalues<T>);
}

py::array_t<double> hermitian_eigenvalues(
    const py::array_t<std::complex<double>, py::array::c_style>& a) {
  return eigenvalues(a, &tb::hermitian_eigenvalues);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of tbfast. Use tbfast's functions; these check little.";
  m.def("fit", &fit, py::arg("values"), py::arg("offsets"), py::kw_only(), py::arg("kind"),
        py::arg("xmin_pos"), py::arg("smooth"), py::arg("k"), py::arg("bins"),
        py::arg("peak_compat"), py::arg("max_alpha"), py::arg("threads"),
        "Fit many spectra: (alpha, xmin, ks, start, n_tail, reason), arrays of shape (spectra,).");
  m.def("symmetric_eigenvalues", &symmetric_eigenvalues<float>, py::arg("a").noconvert(),
        "Eigenvalues (count, n), ascending, of matrices (count, n, n); reads the upper triangle.");
  m.def("symmetric_eigenvalues", &symmetric_eigenvalues<double>, py::arg("a").noconvert());
  m.def("hermitian_eigenvalues", &hermitian_eigenvalues, py::arg("a").noconvert(),
        "The same of complex Hermitian matrices, several at once; for small ones.");
  tb::bind_table(m);
  tb::bind_lanczos(m);
  tb::bind_quadrature(m);
  tb::bind_inner(m);
  tb::bind_rsvd(m);
  tb::bind_gram_bf16(m);
  tb::bind_merge(m);
  tb::bind_stream(m);
  m.def("num_threads", &tb::num_threads, "Threads the kernels use.");
  m.def("isa", &tb::isa, "Instruction set in use.");
  m.def("isas", &tb::available_isas, "Instruction sets compiled in that this machine can run.");
}
