// Merging of models, tensor by tensor: from files or memory, into a file or memory. No Python.
//
// Selection copies bits; the other methods compute in float, or in double where an input is double,
// in the order of the models and without fused operations, and round once. Random numbers are
// Philox4x32-10, keyed by tensor and purpose; the counter is the place of an element in the whole
// tensor. So neither threads nor chunks nor files change a bit.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace tb {

// What an element is, as far as merging has to know. The numbers are those of
// tbfast/merging/dtypes.py; other elements (integers, booleans) are bits of some width.
enum class Number : int64_t {
  bits = 0,
  f8_e4m3 = 1,
  f8_e5m2 = 2,
  f16 = 3,
  bf16 = 4,
  f32 = 5,
  f64 = 6
};

enum class Method : int64_t {
  select = 0,
  linear = 1,
  task = 2,
  slerp = 3,
  ties = 4,
  dare_linear = 5,
  dare_ties = 6
};

// How DARE makes up for what it drops: divides by the density, restores the L1 norm, or not at all.
enum class Rescale : int64_t { paper = 0, l1 = 1, none = 2 };

// Words 0 and 1 are Philox's key, words 2 and 3 the upper half of the counter. The lowest bit of
// word 3 is clear: it tells the bytes of many elements from the digits of a single one.
struct DrawKey {
  std::array<uint32_t, 4> word;
};

// Where a tensor begins: in memory, or at an offset of an open file.
struct Place {
  const char* memory = nullptr;
  int64_t file = -1;  // descriptor
  int64_t offset = 0;
};

struct Input {
  Place place;
  Number type = Number::bits;  // bits: of the width of the output
};

// One tensor to be merged.
struct Merge {
  Method method = Method::select;
  int64_t elements = 0;
  int64_t start = 0;           // place of the first element in the whole tensor, for random numbers
  int64_t width = 0;           // bytes of an element of the output
  Number type = Number::bits;  // of the output
  std::vector<Input> models;
  std::vector<Input> base;  // one or none
  Place out;
  char* out_memory = nullptr;

  std::vector<double> weights;
  // select: a model is taken for draws u < 2^32 below its bound; the last bound is 2^32
  std::vector<uint64_t> bounds;
  DrawKey select{};
  std::vector<DrawKey> reselect;  // one for each further draw
  bool redraw_changed = false;    // further draws: one, among the models that changed the base
  std::vector<DrawKey> drop;      // DARE: of each model
  double density = 1, scale = 1, t = 0.5;
  Rescale rescale = Rescale::paper;

  // The models, then the base.
  size_t input_count() const { return models.size() + base.size(); }
  const Input& input(size_t i) const { return i < models.size() ? models[i] : base[0]; }
};

// Bytes of an element; of bits, as many as the output's.
int64_t bytes_of(Number type, int64_t width);

struct Merged {
  std::vector<int64_t> picked;  // elements taken from each model, by selection
  int64_t unchanged = 0;        // elements in which every model equals the base
  int64_t bad_element = -1;     // the first that is NaN or infinite, in the whole tensor, or -1
  int64_t bad_input = -1;       // in which model, the base after them; -1: the method made it so

  void add(const Merged& next);
};

// What stops a merge.
struct MergeFault : std::runtime_error {
  MergeFault(const std::string& what, int64_t tensor, int64_t input, int code)
      : std::runtime_error(what), tensor(tensor), input(input), code(code) {}
  int64_t tensor;  // its number
  int64_t input;   // of the models, the base after them; -1 for the output
  int code;        // errno, or 0 where a file is shorter than it was
};

// Runs some merges on up to `threads` threads. Memory: a few MiB for each thread; TIES keeps a
// hundredth of the largest tensor beside them.
std::vector<Merged> merge(const std::vector<Merge>& merges, int threads);

// How models differ from their base in one tensor.
struct Difference {
  std::vector<int64_t> changed;  // elements of each model with other bits than the base's
  std::vector<int64_t> bad;      // elements of each model that are NaN or infinite
  std::vector<double> products;  // k x k inner products of the differences to the base; of numbers
  int64_t unchanged = 0;         // elements in which every model has the base's bits
};

// Of each of some tensors; of a Merge the elements, the types and the inputs count.
std::vector<Difference> differences(const std::vector<Merge>& tensors, int threads);

}  // namespace tb
