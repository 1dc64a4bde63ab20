// tbfast._native.stream_sum and multiply_adds: what the machine can do, for tbfast/bench.py.
#include <algorithm>
#include <atomic>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

constexpr int64_t kPiece = 1 << 17;  // words that a thread takes at a time: 1 MiB

uint64_t stream_sum(const tb::Array<uint64_t>& words, int threads) {
  if (words.ndim() != 1) throw py::value_error("words must be one-dimensional");
  const uint64_t* data = words.data();
  const int64_t n = words.size();
  std::atomic<uint64_t> total{0};
  const py::gil_scoped_release unlocked;
  tb::parallel_for((n + kPiece - 1) / kPiece, threads, [&](int64_t i) {
    total += tb::kernels().stream_sum(data + i * kPiece, std::min(kPiece, n - i * kPiece));
  });
  return total;
}

int64_t multiply_adds(int64_t flops, int threads) {
  if (flops < 1 || threads < 1) throw py::value_error("flops and threads must be 1 or more");
  const int64_t per_step = tb::kernels().fma_flops_per_step() * threads;
  const int64_t steps = (flops + per_step - 1) / per_step;
  std::atomic<bool> finite{true};
  const py::gil_scoped_release unlocked;
  tb::parallel_for(threads, threads, [&](int64_t) {
    // Each chain runs towards 2. Looking at it keeps the compiler from leaving it out.
    if (!(tb::kernels().fma_chains(steps) > 0)) finite = false;
  });
  return finite ? steps * per_step : 0;
}

}  // namespace

void tb::bind_stream(py::module_& m) {
  m.def("stream_sum", &stream_sum, py::arg("words").noconvert(), py::kw_only(), py::arg("threads"),
        "Sum of the words modulo 2^64, each read once.");
  m.def("multiply_adds", &multiply_adds, py::arg("flops"), py::kw_only(), py::arg("threads"),
        "Runs at least so many float32 operations, multiply and add, in registers; their number.");
}
