// tbfast._native.gram_bf16 and bf16_multiply: for tests only; see cpu/bf16.h.
#include <pybind11/stl.h>

#include <cstring>
#include <new>

#include "bind.h"
#include "cpu/bf16.h"

namespace py = pybind11;

namespace {

constexpr int64_t kProbes = tb::kBf16Probes;

const tb::GramBf16Engine& engine(const std::string& name) {
  std::string known;
  for (const tb::GramBf16Engine& e : tb::gram_bf16_engines()) {
    if (name == e.name) return e;
    known += (known.empty() ? "" : ", ") + std::string(e.name);
  }
  throw py::value_error("engine must be one of " + known + " on this machine, got '" + name + "'");
}

// y plus the product, in a new array. Scratch is of the stated size and starts as NaN.
tb::Array<float> gram_bf16(const std::string& name, const py::array_t<uint16_t, 0>& w,
                           const tb::Array<float>& x, const tb::Array<float>& y, bool wide) {
  constexpr py::ssize_t kElement = sizeof(uint16_t);
  if (w.ndim() != 2 || w.shape(0) < 1 || w.shape(1) < 1 || w.strides(1) != kElement ||
      w.strides(0) % kElement != 0) {
    throw py::value_error("w must be a matrix with adjacent columns");
  }
  const int64_t length = w.shape(wide ? 0 : 1);
  for (const auto* v : {&x, &y}) {
    if (v->ndim() != 2 || v->shape(0) != kProbes || v->shape(1) < length) {
      throw py::value_error("x and y must have shape (16, at least " + std::to_string(length) +
                            ")");
    }
  }
  const tb::GramBf16Engine& chosen = engine(name);
  tb::Array<float> out({y.shape(0), y.shape(1)});
  std::memcpy(out.mutable_data(), y.data(), static_cast<size_t>(y.nbytes()));
  std::vector<char> scratch(static_cast<size_t>(tb::gram_bf16_scratch(length, wide)), '\xff');
  chosen.apply(w.data(), w.strides(0) / kElement, w.shape(0), w.shape(1), wide, x.data(),
               x.shape(1), out.mutable_data(), out.shape(1), scratch.data());
  return out;
}

tb::Array<float> bf16_multiply(const std::string& name, const tb::Array<uint16_t>& rows,
                               const tb::Array<uint16_t>& pairs, const tb::Array<float>& sums,
                               bool share_rows) {
  if (rows.size() != 512 || pairs.size() != 512 || sums.size() != 256) {
    throw py::value_error("rows and pairs must have shape (16, 32), sums (16, 16)");
  }
  tb::Array<float> out({16, 16});
  std::memcpy(out.mutable_data(), sums.data(), sizeof(float) * 256);
  engine(name).multiply(rows.data(), pairs.data(), share_rows, out.mutable_data());
  return out;
}

}  // namespace

void tb::bind_gram_bf16(py::module_& m) {
  m.def(
      "gram_bf16_engines",
      [] {
        std::vector<std::string> names;
        for (const GramBf16Engine& e : gram_bf16_engines()) names.emplace_back(e.name);
        return names;
      },
      "Ways to run gram_bf16 on this machine.");
  m.def("gram_bf16", &gram_bf16, py::arg("engine"), py::arg("w").noconvert(),
        py::arg("x").noconvert(), py::arg("y").noconvert(), py::kw_only(), py::arg("wide"),
        "y + W^T (W x), or y + W (W^T x) if wide, for bfloat16 bits w and 16 probes.");
  m.def("bf16_multiply", &bf16_multiply, py::arg("engine"), py::arg("rows").noconvert(),
        py::arg("pairs").noconvert(), py::arg("sums").noconvert(), py::kw_only(),
        py::arg("share_rows"), "One step of an engine's multiplier; see cpu/bf16.h.");
}
