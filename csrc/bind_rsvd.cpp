// rsvd of a Table, and the random bits it starts from.
#include <pybind11/stl.h>

#include <array>
#include <complex>

#include "bind.h"
#include "philox.h"
#include "rsvd.h"

namespace py = pybind11;

namespace tb {
namespace {

py::dtype factor_dtype(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return py::dtype::of<double>();
    case DType::c64:
      return py::dtype::of<std::complex<float>>();
    case DType::c128:
      return py::dtype::of<std::complex<double>>();
    default:
      return py::dtype::of<float>();
  }
}

py::list rsvd_of_table(const Table& table, int64_t rank, int64_t oversample, int64_t power_iters,
                       uint64_t seed, int threads) {
  if (rank < 1 || oversample < 0 || power_iters < 0 || threads < 1) {
    throw py::value_error("rsvd option out of range");
  }
  const std::vector<Matrix>& matrices = table.matrices();
  py::list found;
  std::vector<Factors> out;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    if (rank > m.count()) {
      throw py::value_error("rank is above the shorter side of matrix " + std::to_string(i));
    }
    const py::dtype dtype = factor_dtype(m.dtype);
    py::array u(dtype, {m.rows, rank}), vh(dtype, {rank, m.cols});
    py::array_t<double> s(rank);
    out.push_back({u.mutable_data(), s.mutable_data(), vh.mutable_data()});
    found.append(py::make_tuple(u, s, vh));
  }
  std::vector<double> errors;
  {
    const py::gil_scoped_release unlocked;
    errors = rsvd(matrices, {rank, oversample, power_iters, seed}, out, threads);
  }
  for (size_t i = 0; i < errors.size(); ++i) {
    found[i] = py::tuple(found[i]) + py::make_tuple(errors[i]);
  }
  return found;
}

std::array<uint32_t, 4> philox_words(const std::array<uint32_t, 4>& counter,
                                     const std::array<uint32_t, 2>& key) {
  const Philox bits = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {bits.word[0], bits.word[1], bits.word[2], bits.word[3]};
}

}  // namespace

void bind_rsvd(py::module_& m) {
  m.def("rsvd", &rsvd_of_table, py::arg("table"), py::kw_only(), py::arg("rank"),
        py::arg("oversample"), py::arg("power_iters"), py::arg("seed"), py::arg("threads"),
        "(U, S, Vh, relative residual) of every matrix; the residual is NaN if it is not finite.");
  m.def("philox", &philox_words, py::arg("counter"), py::arg("key"),
        "Philox4x32-10: four words from four and a key of two.");
}

}  // namespace tb
