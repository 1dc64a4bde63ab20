// quadrature_fit and gauss_quadrature.
#include "bind.h"
#include "quadrature.h"

namespace py = pybind11;

namespace tb {
namespace {

template <typename T, typename Field>
Array<T> column(const std::vector<SketchFit>& table, Field field) {
  std::vector<T> values;
  values.reserve(table.size());
  for (const SketchFit& row : table) values.push_back(static_cast<T>(field(row)));
  const auto size = static_cast<py::ssize_t>(values.size());
  return as_array(std::move(values), {size});
}

template <typename T>
std::vector<T> copied(const Array<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

Tridiagonals checked(const Array<double>& diagonal, const Array<double>& off_diagonal,
                     const Array<int32_t>& taken, const Array<int64_t>& first,
                     const Array<int64_t>& count, double eps) {
  if (diagonal.ndim() != 3 || off_diagonal.ndim() != 3 || diagonal.shape(2) < 1 ||
      diagonal.shape(1) < 1 || first.ndim() != 1 || first.size() < 1) {
    throw py::value_error(
        "diagonal must have shape (matrices, probes, steps), first (layers + 1,)");
  }
  const py::ssize_t matrices = diagonal.shape(0), probes = diagonal.shape(1);
  if (!std::equal(diagonal.shape(), diagonal.shape() + 3, off_diagonal.shape()) ||
      taken.ndim() != 2 || taken.shape(0) != matrices || taken.shape(1) != probes ||
      count.ndim() != 1 || count.size() != matrices) {
    throw py::value_error("the shapes of diagonal, off_diagonal, taken and count do not agree");
  }
  Tridiagonals runs{diagonal.shape(2), probes,
                    copied(diagonal),  copied(off_diagonal),
                    copied(taken),     copied(first),
                    copied(count),     std::vector<double>(static_cast<size_t>(matrices), eps)};
  for (const int32_t steps : runs.taken) {
    if (steps < 1 || steps > runs.steps) throw py::value_error("taken must lie in 1 .. steps");
  }
  for (const int64_t eigenvalues : runs.count) {
    if (eigenvalues < 1) throw py::value_error("count must be at least 1");
  }
  for (size_t layer = 1; layer < runs.first.size(); ++layer) {
    if (runs.first[layer] <= runs.first[layer - 1]) {
      throw py::value_error("each layer must have a matrix");
    }
  }
  if (runs.first.front() != 0 || runs.first.back() != matrices) {
    throw py::value_error("first must run from 0 to the number of matrices");
  }
  return runs;
}

py::tuple fit_runs(const Array<double>& diagonal, const Array<double>& off_diagonal,
                   const Array<int32_t>& taken, const Array<int64_t>& first,
                   const Array<int64_t>& count, double eps, int64_t kind, double xmin_pos,
                   double smooth, int64_t k, int64_t bins, bool peak_compat, double max_alpha,
                   int threads) {
  const Tridiagonals runs = checked(diagonal, off_diagonal, taken, first, count, eps);
  if (kind < 0 || kind > 3 || !(xmin_pos > 1) || k < 2 || bins < 1 || threads < 1) {
    throw py::value_error("fit option out of range");
  }
  const FitOptions options{
      static_cast<FitKind>(kind), xmin_pos, smooth, k, bins, peak_compat, max_alpha};
  std::vector<SketchFit> t;
  {
    const py::gil_scoped_release unlocked;
    t = quadrature_fit(runs, options, threads);
  }
  return py::make_tuple(column<double>(t, [](const SketchFit& f) { return f.fit.alpha; }),
                        column<double>(t, [](const SketchFit& f) { return f.fit.xmin; }),
                        column<double>(t, [](const SketchFit& f) { return f.fit.ks; }),
                        column<int64_t>(t, [](const SketchFit& f) { return f.fit.start; }),
                        column<int64_t>(t, [](const SketchFit& f) { return f.fit.n_tail; }),
                        column<int64_t>(t, [](const SketchFit& f) { return f.fit.reason; }),
                        column<int64_t>(t, [](const SketchFit& f) { return f.n_zeros; }),
                        column<double>(t, [](const SketchFit& f) { return f.max_eigenvalue; }),
                        column<double>(t, [](const SketchFit& f) { return f.sum_eigenvalues; }),
                        column<double>(t, [](const SketchFit& f) { return f.sketch_error; }));
}

py::tuple gauss(const Array<double>& diagonal, const Array<double>& off_diagonal) {
  const py::ssize_t size = diagonal.size();
  if (diagonal.ndim() != 1 || size < 1 || off_diagonal.ndim() != 1 ||
      off_diagonal.size() != size - 1) {
    throw py::value_error("diagonal must have shape (size,), off_diagonal (size - 1,)");
  }
  Array<double> nodes(size), weights(size);
  gauss_quadrature(diagonal.data(), off_diagonal.data(), size, nodes.mutable_data(),
                   weights.mutable_data());
  return py::make_tuple(nodes, weights);
}

}  // namespace

void bind_quadrature(py::module_& m) {
  m.def("quadrature_fit", &fit_runs, py::arg("diagonal"), py::arg("off_diagonal"), py::arg("taken"),
        py::arg("first"), py::arg("count"), py::kw_only(), py::arg("eps"), py::arg("kind"),
        py::arg("xmin_pos"), py::arg("smooth"), py::arg("k"), py::arg("bins"),
        py::arg("peak_compat"), py::arg("max_alpha"), py::arg("threads"),
        "Fit what Lanczos runs tell: (alpha, xmin, ks, start, n_tail, reason, n_zeros, "
        "max_eigenvalue, sum_eigenvalues, sketch_error), arrays of shape (layers,).");
  m.def("gauss_quadrature", &gauss, py::arg("diagonal"), py::arg("off_diagonal"),
        "Nodes, ascending, and weights of a Jacobi matrix.");
}

}  // namespace tb
