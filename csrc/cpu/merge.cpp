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

constexpr int64_t kHeld = int64_t{72} << 20;  // bytes: a Llama-1B's largest block, three times

struct Chunk {
  int64_t tensor;
  int64_t first;  // element
  int64_t count;
};

void append_chunks(const Merge& what, int64_t tensor, std::vector<Chunk>* chunks) {
  for (int64_t first = 0; first < what.elements; first += kChunk) {
    chunks->push_back({tensor, first, std::min(kChunk, what.elements - first)});
  }
}

// Merges a chunk and writes it.
Merged finish(const Merge& what, const Whole& whole, const Kernels& isa, const Chunk& chunk) {
  thread_local ChunkInputs inputs;
  thread_local std::vector<char> merged;
  const int64_t at = chunk.first * what.width, bytes = chunk.count * what.width;
  merged.resize(static_cast<size_t>(kChunk * 8));
  inputs.load(what, chunk.tensor, chunk.first, chunk.count);
  Merged found = merge_chunk(what, whole, isa, inputs, chunk.first, chunk.count, merged.data());
  if (what.out_memory != nullptr) {
    std::memcpy(what.out_memory + at, merged.data(), static_cast<size_t>(bytes));
  } else if (const int code = write_at(what.out, at, bytes, merged.data())) {
    throw MergeFault("cannot write", chunk.tensor, -1, code);
  }
  return found;
}

// The same merge with its inputs in `room`, if they are not too many: a tensor that is gone over
// more than once is read once.
Merge held(const Merge& what, int64_t tensor, int threads, std::vector<char>* room) {
  constexpr int64_t kPiece = 1 << 20;
  struct Piece {
    size_t input;
    int64_t from, bytes, to;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> begins;
  int64_t total = 0;
  for (size_t i = 0; i < what.input_count(); ++i) {
    const int64_t size = what.elements * bytes_of(what.input(i).type, what.width);
    begins.push_back(total);
    for (int64_t from = 0; from < size; from += kPiece) {
      pieces.push_back({i, from, std::min(kPiece, size - from), total + from});
    }
    total += (size + 7) / 8 * 8;  // aligned for every type
  }
  if (total > kHeld) return what;
  if (static_cast<int64_t>(room->size()) < total) room->resize(static_cast<size_t>(total));
  parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    read_input(what, tensor, piece.input, piece.from, piece.bytes, room->data() + piece.to);
  });
  Merge moved = what;
  for (size_t i = 0; i < moved.input_count(); ++i) {
    Input& input = i < moved.models.size() ? moved.models[i] : moved.base[0];
    input.place = Place{room->data() + begins[i], -1, 0};
  }
  return moved;
}

}  // namespace

std::vector<Merged> merge(const std::vector<Merge>& merges, int threads) {
  const Kernels& isa = kernels();
  std::vector<Merged> found(merges.size());
  for (size_t tensor = 0; tensor < merges.size(); ++tensor) {
    found[tensor].picked.assign(merges[tensor].models.size(), 0);
  }
  std::vector<Chunk> chunks;
  const auto finish_chunks = [&](const auto& merge_of, const auto& whole_of) {
    std::vector<Merged> parts(chunks.size());
    parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
      const Chunk& chunk = chunks[static_cast<size_t>(i)];
      parts[static_cast<size_t>(i)] = finish(merge_of(chunk), whole_of(chunk), isa, chunk);
    });
    for (size_t i = 0; i < chunks.size(); ++i) {
      found[static_cast<size_t>(chunks[i].tensor)].add(parts[i]);
    }
    chunks.clear();
  };
  // Most methods take chunks as they come, of many tensors at a time.
  std::vector<Whole> wholes(merges.size());
  for (size_t tensor = 0; tensor < merges.size(); ++tensor) {
    const auto number = static_cast<int64_t>(tensor);
    if (looks_at_all(merges[tensor])) continue;
    wholes[tensor] = examine(merges[tensor], number, isa, threads);
    append_chunks(merges[tensor], number, &chunks);
  }
  finish_chunks(
      [&](const Chunk& c) -> const Merge& { return merges[static_cast<size_t>(c.tensor)]; },
      [&](const Chunk& c) -> const Whole& { return wholes[static_cast<size_t>(c.tensor)]; });
  // The others have to see a tensor before they merge it.
  std::vector<char> room;
  for (size_t tensor = 0; tensor < merges.size(); ++tensor) {
    const auto number = static_cast<int64_t>(tensor);
    if (!looks_at_all(merges[tensor])) continue;
    const Merge what = held(merges[tensor], number, threads, &room);
    const Whole whole = examine(what, number, isa, threads);
    append_chunks(what, number, &chunks);
    finish_chunks([&](const Chunk&) -> const Merge& { return what; },
                  [&](const Chunk&) -> const Whole& { return whole; });
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
