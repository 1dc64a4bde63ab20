#include "cuda/spectral_plan.h"

#include <algorithm>
#include <utility>

namespace tb::gpu {
namespace {

// Rows of a slice: enough that writing y and reading it again, 64 bytes for each column, is little
// beside the slice, and few enough that small matrices keep many blocks busy.
constexpr int64_t kShortSlice = 256, kLongSlice = 1024, kLarge = int64_t{1} << 22;
constexpr int64_t kAlignment = 16;  // bytes of an asynchronous copy

int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

Path path_of(const SpectralEntry& e) {
  const bool two_bytes = e.dtype == DType::bf16 || e.dtype == DType::f16;
  if (!two_bytes && e.dtype != DType::f32) return Path::convert;
  const int64_t bytes = element_bytes(e.dtype), step = kAlignment / bytes;
  if (reinterpret_cast<uintptr_t>(e.data) % kAlignment != 0) return Path::convert;
  // A copy must not reach over the end of a row, nor of a column.
  if (e.col_stride == 1 && e.row_stride % step == 0 && e.cols % step == 0) {
    return two_bytes ? Path::mma : Path::fma;
  }
  if (e.row_stride == 1 && e.col_stride % step == 0 && e.rows % step == 0) {
    return two_bytes ? Path::mma_transposed : Path::fma_transposed;
  }
  return Path::convert;
}

SpectralEntry entry_of(const Matrix& m) {
  SpectralEntry e{};
  const bool tall = m.rows >= m.cols;
  e.data = m.data;
  e.rows = tall ? m.rows : m.cols;
  e.cols = tall ? m.cols : m.rows;
  e.row_stride = tall ? m.row_stride : m.col_stride;
  e.col_stride = tall ? m.col_stride : m.row_stride;
  e.dtype = m.dtype;
  e.conjugate = tall ? 1 : -1;
  e.length = m.length();
  e.element = m.index * e.length;
  e.path = path_of(e);
  const int64_t rows = e.rows * parts(e.dtype);
  e.slice_rows = static_cast<int32_t>(rows * e.length < kLarge ? kShortSlice : kLongSlice);
  e.slices = static_cast<int32_t>(pieces(rows, e.slice_rows));
  e.segments = static_cast<int32_t>(pieces(e.length, kSegment));
  return e;
}

// Places the entry's vectors behind `floats` and `counters`.
void place(SpectralEntry& e, int64_t steps, int64_t& floats, int64_t& counters) {
  const auto take = [&](int64_t count) {
    return std::exchange(floats, floats + pieces(count, 64) * 64);
  };
  const int64_t block = kProbes * e.length;
  e.basis = take(std::min(steps, e.cols) * block);
  e.sums = take(block);
  e.partials = take(e.slices * block);
  e.exchange = take(e.segments > 1 ? e.slices * kTeamSlots * e.segments * kPanel * kProbes : 0);
  e.arrived = counters;
  counters += e.slices;
}

}  // namespace

SpectralPlan::SpectralPlan(const std::vector<Matrix>& matrices, const std::vector<uint32_t>& names,
                           int64_t probes, int64_t steps, int64_t memory)
    : probes(probes), steps(steps) {
  int64_t given = 0, round_floats = 0, round_counters = 0;
  for (size_t index = 0; index < matrices.size(); ++index) {
    const Matrix& m = matrices[index];
    for (int64_t first = 0; first < probes; first += kProbes) {
      SpectralEntry e = entry_of(m);
      e.name = names[static_cast<size_t>(m.layer)];
      e.first_probe = static_cast<int32_t>(first);
      e.probes = static_cast<int32_t>(std::min<int64_t>(kProbes, probes - first));
      e.run = static_cast<int64_t>(index) * probes + first;
      e.given = given + first * e.length;
      int64_t end = round_floats, end_counters = round_counters;
      place(e, steps, end, end_counters);
      const auto entry = static_cast<int32_t>(entries.size());
      const auto item = static_cast<int32_t>(items.size());
      if (rounds.empty() || end * static_cast<int64_t>(sizeof(float)) > memory) {
        rounds.push_back({entry, entry, item, item});
        end = end_counters = 0;
        place(e, steps, end, end_counters);
      }
      round_floats = end;
      round_counters = end_counters;
      floats = std::max(floats, end);
      counters = std::max(counters, end_counters);
      widest = std::max(widest, e.segments);
      entries.push_back(e);
      for (int32_t slice = 0; slice < e.slices; ++slice) {
        for (int32_t segment = 0; segment < e.segments; ++segment) {
          items.push_back({entry, slice, segment});
        }
      }
      SpectralRound& round = rounds.back();
      round.entry_end = entry + 1;
      round.item_end = static_cast<int32_t>(items.size());
      most_items = std::max({most_items, round.item_end - round.item_begin,
                             (round.entry_end - round.entry_begin) * kProbes});
    }
    given += probes * m.length();
  }
}

}  // namespace tb::gpu
