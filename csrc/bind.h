// What the files that make up tbfast._native share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lanczos.h"
#include "ragged.h"

namespace tb {

// tbfast._native.Table: where the matrices of a batch lie. It borrows their memory: tbfast.Batch
// keeps it fresh and checks, before each use, that the tensors are still there.
class Table {
 public:
  // descriptors: (matrices, 7) pointer, rows, cols, row stride, column stride, dtype, layer
  // names:       (layers,) CRC-32 of the name of each layer
  Table(const pybind11::array_t<int64_t, pybind11::array::c_style>& descriptors,
        std::vector<uint32_t> names);

  const std::vector<Matrix>& matrices() const { return matrices_; }
  int64_t layers() const { return static_cast<int64_t>(names_.size()); }
  const std::vector<uint32_t>& names() const { return names_; }
  uint32_t name(int64_t layer) const { return names_[static_cast<size_t>(layer)]; }

  // Memory that runs on this table use again and again.
  Workspaces& workspaces() const { return *workspaces_; }

 private:
  std::vector<Matrix> matrices_;
  std::vector<uint32_t> names_;
  std::shared_ptr<Workspaces> workspaces_ = make_workspaces();
};

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// Takes over a vector as a NumPy array without a copy of it.
template <typename T>
Array<T> as_array(std::vector<T>&& values, std::vector<pybind11::ssize_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  const pybind11::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return Array<T>(std::move(shape), kept->data(), owner);
}

void bind_table(pybind11::module_& m);
void bind_lanczos(pybind11::module_& m);
void bind_quadrature(pybind11::module_& m);
void bind_inner(pybind11::module_& m);
void bind_rsvd(pybind11::module_& m);
void bind_merge(pybind11::module_& m);
void bind_gram_bf16(pybind11::module_& m);
void bind_stream(pybind11::module_& m);

}  // namespace tb
