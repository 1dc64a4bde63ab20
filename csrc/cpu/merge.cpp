// Chunks of tensors on threads: read, merge block by block, write. A chunk has a fixed number of
// elements, so sums over chunks, added in their order, do not depend on the threads.
#include "merge.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/isa.h"
#include "cpu/merge_block.h"
#include "cpu/merge_io.h"
#include "cpu/merge_whole.h"
#include "cpu/parallel.h"

namespace tb {
namespace {

struct Chunk {
  int64_t tensor;
  int64_t first;  // element
  int64_t count;
};

}  // namespace

std::vector<Merged> merge(const std::vector<Merge>& merges, int threads) {
  const Kernels& isa = kernels();
  std::vector<Whole> wholes(merges.size());
  std::vector<Chunk> chunks;
  for (size_t tensor = 0; tensor < merges.size(); ++tensor) {
    const auto number = static_cast<int64_t>(tensor);
    wholes[tensor] = examine(merges[tensor], number, isa, threads);
    for (int64_t first = 0; first < merges[tensor].elements; first += kChunk) {
      chunks.push_back({number, first, std::min(kChunk, merges[tensor].elements - first)});
    }
  }
  std::vector<Merged> parts(chunks.size());
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    thread_local ChunkInputs inputs;
    thread_local std::vector<char> merged;
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    const Merge& what = merges[static_cast<size_t>(chunk.tensor)];
    const int64_t at = chunk.first * what.width, bytes = chunk.count * what.width;
    merged.resize(static_cast<size_t>(kChunk * 8));
    inputs.load(what, chunk.tensor, chunk.first, chunk.count);
    parts[static_cast<size_t>(i)] =
        merge_chunk(what, wholes[static_cast<size_t>(chunk.tensor)], isa, inputs, chunk.first,
                    chunk.count, merged.data());
    if (what.out_memory != nullptr) {
      std::memcpy(what.out_memory + at, merged.data(), static_cast<size_t>(bytes));
    } else if (const int code = write_at(what.out, at, bytes, merged.data())) {
      throw MergeFault("cannot write", chunk.tensor, -1, code);
    }
  });
  std::vector<Merged> found(merges.size());
  for (size_t tensor = 0; tensor < merges.size(); ++tensor) {
    found[tensor].picked.assign(merges[tensor].models.size(), 0);
  }
  for (size_t i = 0; i < chunks.size(); ++i) {
    found[static_cast<size_t>(chunks[i].tensor)].add(parts[i]);
  }
  return found;
}

void Merged::add(const Merged& next) {
  for (size_t model = 0; model < next.picked.size(); ++model) picked[model] += next.picked[model];
  unchanged += next.unchanged;
  if (bad_element < 0) {
    bad_input = next.bad_input;
    bad_element = next.bad_element;
  }
}

}  // namespace tb
