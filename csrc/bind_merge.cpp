// tbfast._native.Merge and merge: the bridge to csrc/merge.h.
#include "merge.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bind.h"

namespace py = pybind11;

namespace {

using Key = std::array<uint32_t, 4>;
using InputTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // memory, file, offset, type
using OutTuple = std::tuple<uintptr_t, int64_t, int64_t>;             // memory, file, offset

std::vector<tb::Input> inputs(const std::vector<InputTuple>& given) {
  std::vector<tb::Input> found;
  for (const auto& [memory, file, offset, type] : given) {
    if (type < 0 || type > 6) throw py::value_error("type out of range");
    found.push_back(
        {{reinterpret_cast<const char*>(memory), file, offset}, static_cast<tb::Number>(type)});
  }
  return found;
}

tb::Merge make_merge(int64_t method, int64_t elements, int64_t start, int64_t width, int64_t type,
                     const std::vector<InputTuple>& models, const std::vector<InputTuple>& base,
                     const OutTuple& out, std::vector<double> weights, std::vector<uint64_t> bounds,
                     const Key& select, const std::vector<Key>& reselect, bool redraw_changed,
                     const std::vector<Key>& drop, double density, double scale, double t,
                     int64_t rescale) {
  if (method < 0 || method > 6 || type < 0 || type > 6 || rescale < 0 || rescale > 2 ||
      elements < 0 || start < 0 || (width != 1 && width != 2 && width != 4 && width != 8)) {
    throw py::value_error("merge option out of range");
  }
  if (models.empty() || models.size() > 32 || base.size() > 1) {
    throw py::value_error("need 1 to 32 models and at most one base");
  }
  tb::Merge what;
  what.method = static_cast<tb::Method>(method);
  what.elements = elements;
  what.start = start;
  what.width = width;
  what.type = static_cast<tb::Number>(type);
  what.models = inputs(models);
  what.base = inputs(base);
  what.out_memory = reinterpret_cast<char*>(std::get<0>(out));
  what.out = {nullptr, std::get<1>(out), std::get<2>(out)};
  what.weights = std::move(weights);
  what.bounds = std::move(bounds);
  what.select = {select};
  for (const Key& key : reselect) what.reselect.push_back({key});
  for (const Key& key : drop) what.drop.push_back({key});
  what.redraw_changed = redraw_changed;
  what.density = density;
  what.scale = scale;
  what.t = t;
  what.rescale = static_cast<tb::Rescale>(rescale);

  const size_t k = models.size();
  const bool select_ok = what.bounds.size() == k && (!redraw_changed || !what.reselect.empty());
  const bool dare = what.method == tb::Method::dare_linear || what.method == tb::Method::dare_ties;
  const bool moves = dare || what.method == tb::Method::task || what.method == tb::Method::ties;
  if ((what.method == tb::Method::select ? !select_ok : what.weights.size() != k) ||
      (moves != (base.size() == 1) && what.method != tb::Method::select) ||
      (what.method == tb::Method::slerp && k != 2) || (dare && drop.size() != k) ||
      (what.method != tb::Method::select && what.type < tb::Number::f16)) {
    throw py::value_error("the method misses something, or has too much");
  }
  return what;
}

using Row = std::tuple<std::vector<int64_t>, int64_t, int64_t, int64_t>;

std::vector<Row> run_merges(const std::vector<tb::Merge>& merges, int threads) {
  if (threads < 1) throw py::value_error("threads must be 1 or more");
  std::vector<tb::Merged> merged;
  {
    const py::gil_scoped_release unlocked;
    merged = tb::merge(merges, threads);
  }
  std::vector<Row> rows;
  for (tb::Merged& m : merged) {
    rows.emplace_back(std::move(m.picked), m.unchanged, m.bad_element, m.bad_input);
  }
  return rows;
}

using Counts = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<double>, int64_t>;

std::vector<Counts> count_differences(const std::vector<tb::Merge>& tensors, int threads) {
  if (threads < 1) throw py::value_error("threads must be 1 or more");
  for (const tb::Merge& tensor : tensors) {
    if (tensor.base.size() != 1) throw py::value_error("differences need a base");
  }
  std::vector<tb::Difference> found;
  {
    const py::gil_scoped_release unlocked;
    found = tb::differences(tensors, threads);
  }
  std::vector<Counts> rows;
  for (tb::Difference& d : found) {
    rows.emplace_back(std::move(d.changed), std::move(d.bad), std::move(d.products), d.unchanged);
  }
  return rows;
}

}  // namespace

void tb::bind_merge(py::module_& m) {
  static py::handle fault = py::exception<tb::MergeFault>(m, "MergeFault").release();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const tb::MergeFault& error) {
      const py::tuple arguments = py::make_tuple(error.tensor, error.input, error.code);
      PyErr_SetObject(fault.ptr(), arguments.ptr());
    }
  });
  py::class_<tb::Merge>(m, "Merge", "One tensor to be merged; csrc/merge.h says what is what.")
      .def(py::init(&make_merge), py::kw_only(), py::arg("method"), py::arg("elements"),
           py::arg("start"), py::arg("width"), py::arg("type"), py::arg("models"), py::arg("base"),
           py::arg("out"), py::arg("weights"), py::arg("bounds"), py::arg("select"),
           py::arg("reselect"), py::arg("redraw_changed"), py::arg("drop"), py::arg("density"),
           py::arg("scale"), py::arg("t"), py::arg("rescale"));
  m.def("merge", &run_merges, py::arg("merges"), py::kw_only(), py::arg("threads"),
        "Runs merges; of each: elements picked from each model, elements in which all equal the "
        "base, the first element that is not finite, and the model it is in (-1: the result).");
  m.def("differences", &count_differences, py::arg("tensors"), py::kw_only(), py::arg("threads"),
        "Of tensors with a base: elements of each model that differ from it, that are not finite, "
        "inner products of the differences (lower triangle), and elements in which none differs.");
}
