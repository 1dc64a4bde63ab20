// What the files that make up tbfast._cuda share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace tb::gpu {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// The tables of a plan, which the caller copies to the start of its workspace.
inline Array<unsigned char> image_array(const std::vector<unsigned char>& image) {
  return Array<unsigned char>(static_cast<pybind11::ssize_t>(image.size()), image.data());
}

void bind_spectral(pybind11::module_& m);
void bind_fit(pybind11::module_& m);
void bind_rsvd(pybind11::module_& m);
void bind_inner(pybind11::module_& m);

}  // namespace tb::gpu
