// The matrices of a batch as Python describes them.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>
#include <vector>

#include "ragged.h"

namespace tb {

// descriptors: (matrices, 7) pointer, rows, cols, row stride, column stride, dtype, layer; in the
// order of their layers, of which there are `layers`
inline std::vector<Matrix> matrices_of(
    const pybind11::array_t<int64_t, pybind11::array::c_style>& descriptors, int64_t layers) {
  if (descriptors.ndim() != 2 || descriptors.shape(1) != 7) {
    throw pybind11::value_error("descriptors must have shape (matrices, 7)");
  }
  std::vector<Matrix> matrices;
  int64_t previous = -1, index = 0;
  for (pybind11::ssize_t i = 0; i < descriptors.shape(0); ++i) {
    const int64_t* d = descriptors.data(i, 0);
    if (d[0] == 0 || d[1] < 1 || d[2] < 1 || d[5] < 0 || d[5] > 5) {
      throw pybind11::value_error("descriptor " + std::to_string(i) + " is not a matrix");
    }
    if (d[6] < previous || d[6] >= layers) {
      throw pybind11::value_error("the matrices must stand in the order of their layers");
    }
    index = d[6] == previous ? index + 1 : 0;
    previous = d[6];
    matrices.push_back({reinterpret_cast<const void*>(d[0]), d[1], d[2], d[3], d[4],
                        static_cast<DType>(d[5]), d[6], index});
  }
  return matrices;
}

}  // namespace tb
