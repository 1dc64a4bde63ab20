// The work items of the rsvd kernel that read A or multiply its blocks by small matrices.
#pragma once

#include "cuda/rsvd_tile.cuh"

namespace tb::gpu {

constexpr uint32_t kFillDraw = 1 << 20;  // draws from here on replace vanished directions

template <typename S>
__device__ inline typename Tile<S>::Shared& tile_shared(unsigned char* shared) {
  return *reinterpret_cast<typename Tile<S>::Shared*>(shared);
}

// Rows of a tile that the block has.
template <typename S>
__device__ inline int rows_of(const RsvdSide& block, int64_t tile) {
  const int64_t left = block.length - tile * Tile<S>::kRows;
  return left < Tile<S>::kRows ? static_cast<int>(left) : Tile<S>::kRows;
}

// What A is multiplied by: random signs; the same once A is scaled; Z, or the adjoint by Q.
enum class Product { signs, scaled_signs, factor };

// A slice of a tile of such a product. From A times signs |A|^2 is known too, and the largest
// entry.
template <typename Stored>
__device__ inline void product_item(const RsvdArgs& a, const RsvdEntry& e, const RsvdState& state,
                                    RsvdItem item, int side, Product kind, unsigned char* shared) {
  using S = typename ScalarOf<Stored>::type;
  const RsvdSide &block = e.side[side], &other = e.side[1 - side];
  const bool signs = kind != Product::factor;
  const int64_t first = int64_t{item.tile} * Tile<S>::kRows;
  const int64_t begin = item.part * block.slice_depth;
  const int64_t end =
      begin + block.slice_depth < other.length ? begin + block.slice_depth : other.length;
  Weights<Stored> left(e, side, kind == Product::signs ? 1 : state.scale);
  left.measures = signs;
  // The name of a matrix is no part of the key: its factors are the same in any company.
  const Columns<S> right{signs ? nullptr : at<S>(a, other.block), e.columns,
                         Stream{a.seed, 0, Purpose::sketch, 0}};
  Tile<S> tile;
  multiply(left, right, first, rows_of<S>(block, item.tile), begin, end, e.columns, tile,
           tile_shared<S>(shared));
  const bool whole = block.slices == 1;
  S* out =
      whole ? at<S>(a, block.block) : at<S>(a, e.pieces) + item.part * block.length * e.columns;
  const auto shift = static_cast<RealOf<S>>(side == 0 && !signs && whole ? state.shift : 0);
  out += first * e.columns;
  for_each(tile, rows_of<S>(block, item.tile), e.columns, [&](int row, int column, S value) {
    S& place = out[row * e.columns + column];
    place = shift == 0 ? value : value - place * shift;
  });
  if (!signs) return;
  const double squares = block_sum(left.squares), top = block_max(left.top);
  if (thread_index() != 0) return;
  double* sums = at<double>(a, e.sums) + 2 * (int64_t{item.tile} * block.slices + item.part);
  sums[0] = squares;
  sums[1] = top;
}

// Adds up the slices of a tile.
template <typename S>
__device__ inline void collect_item(const RsvdArgs& a, const RsvdEntry& e, const RsvdState& state,
                                    RsvdItem item, int side, Product kind) {
  const RsvdSide& block = e.side[side];
  if (block.slices == 1) return;
  const int64_t all = block.length * e.columns;
  const int64_t first = int64_t{item.tile} * Tile<S>::kRows * e.columns;
  const int64_t count = rows_of<S>(block, item.tile) * e.columns;
  const auto shift = static_cast<RealOf<S>>(side == 0 && kind == Product::factor ? state.shift : 0);
  S* out = at<S>(a, block.block);
  const S* pieces = at<S>(a, e.pieces);
  for (int64_t i = first + thread_index(); i < first + count; i += kThreads) {
    S sum = pieces[i];
    for (int slice = 1; slice < block.slices; ++slice) sum = sum + pieces[slice * all + i];
    out[i] = shift == 0 ? sum : sum - out[i] * shift;
  }
}

// tile = a tile of a block times a small matrix.
template <typename S>
__device__ inline void times_small(const RsvdArgs& a, const RsvdEntry& e, const RsvdItem& item,
                                   int side, const S* small, int width, Tile<S>& tile,
                                   unsigned char* shared) {
  const RsvdSide& block = e.side[side];
  Rows<S> left{at<S>(a, block.block), e.columns};
  const Columns<S> right{small, e.columns, {}};
  multiply(left, right, int64_t{item.tile} * Tile<S>::kRows, rows_of<S>(block, item.tile), 0,
           e.columns, width, tile, tile_shared<S>(shared));
}

// Multiplies a tile of a block by the R^-1 of `owner`, in place. In the owner's own block,
// directions that vanished become random.
template <typename S>
__device__ __noinline__ void apply_item(const RsvdArgs& a, const RsvdEntry& e, RsvdItem item,
                                        int side, int owner, int pass, unsigned char* shared) {
  const RsvdSide& block = e.side[side];
  const int columns = e.columns;
  Tile<S> tile;
  times_small(a, e, item, side, at<S>(a, e.side[owner].multiplier), columns, tile, shared);
  const int64_t first = int64_t{item.tile} * Tile<S>::kRows;
  const int rows = rows_of<S>(block, item.tile);
  S* x = at<S>(a, block.block) + first * columns;
  for_each(tile, rows, columns,
           [&](int row, int column, S value) { x[row * columns + column] = value; });
  if (side != owner) return;
  __syncthreads();
  const auto* low = at<int32_t>(a, e.low);
  const Stream stream{a.seed, 0, Purpose::sketch, kFillDraw + static_cast<uint32_t>(pass)};
  for (int column = 0; column < columns; ++column) {
    if (low[column] == 0) continue;
    for (int row = thread_index(); row < rows; row += kThreads) {
      const int64_t element = Traits<S>::kParts * column * block.length + first + row;
      const Philox bits = stream.bits(static_cast<uint64_t>(element));
      x[row * columns + column] = from_parts<S>(bits.word[0] * 4.656612873077393e-10 - 1,
                                                bits.word[1] * 4.656612873077393e-10 - 1);
    }
  }
}

// U = Q W or V = Z J, in place, and to where the caller wants them.
template <typename S>
__device__ __noinline__ void write_item(const RsvdArgs& a, const RsvdEntry& e, RsvdItem item,
                                        int side, unsigned char* shared) {
  const RsvdSide& block = e.side[side];
  const auto rank = static_cast<int>(a.rank);
  Tile<S> tile;
  times_small(a, e, item, side, at<S>(a, block.multiplier), rank, tile, shared);
  const bool left = (side == 0) == (e.tall == 0);
  S* x = at<S>(a, block.block);
  S* out = reinterpret_cast<S*>(a.factors + e.out[left ? 0 : 2]);
  const int64_t first = int64_t{item.tile} * Tile<S>::kRows;
  for_each(tile, rows_of<S>(block, item.tile), rank, [&](int place, int column, S value) {
    const int64_t row = first + place;
    x[row * e.columns + column] = value;
    if (left) {
      out[row * rank + column] = value;
    } else {
      out[column * block.length + row] = conjugate(value);
    }
  });
}

// The entries of A - Q S V^H in a tile of rows: the sum of their squares, in double precision. Only
// what is of low rank needs it, so it reads its factors from the cache and not in tiles.
template <typename Stored>
__device__ __noinline__ void residual_item(const RsvdArgs& a, const RsvdEntry& e,
                                           const RsvdState& state, RsvdItem item) {
  using S = typename ScalarOf<Stored>::type;
  using W = WideOf<S>;
  const int rows = rows_of<S>(e.side[0], item.tile);
  const int64_t first = int64_t{item.tile} * Tile<S>::kRows, cols = e.side[1].length;
  const S *u = at<S>(a, e.side[0].block), *v = at<S>(a, e.side[1].block);
  const auto* values = at<double>(a, e.values);
  Weights<Stored> weights(e, 0, state.scale);
  double squares = 0;
  // Neighbouring threads take neighbours in memory.
  const bool by_row = weights.col_stride <= weights.row_stride;
  const int own = thread_index(), down = by_row ? kWarps : Tile<S>::kRows;
  const int row_own = by_row ? own / kLanes : own % down;
  const int column_own = by_row ? own % kLanes : own / down;
#pragma unroll 1
  for (int64_t column = column_own; column < cols; column += kThreads / down) {
#pragma unroll 1
    for (int64_t row = first + row_own; row < first + rows; row += down) {
      W left = widen(weights(row * weights.row_stride + column * weights.col_stride));
#pragma unroll 1
      for (int64_t p = 0; p < a.rank; ++p) {
        const W length = from_parts<W>(-values[p], 0);
        add_product(left, widen(u[row * e.columns + p]) * length,
                    conjugate(widen(v[column * e.columns + p])));
      }
      squares += square(left);
    }
  }
  squares = block_sum(squares);
  if (thread_index() == 0) at<double>(a, e.sums)[item.tile] = squares;
}

}  // namespace tb::gpu
