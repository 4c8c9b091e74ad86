// Decoding: one position per call, the state moved up in place, in one launch.
#pragma once

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/finish.cuh"
#include "csrc/cuda/conv/step_tiles.h"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

constexpr int kStepAhead = 8;  // rows of x that a thread reads ahead

// What a thread of a step knows of its block. Shared memory: the filters, [batch row, head, tap] or [head, tap], then
// rows of states, [batch row, row, channel].
template <class T>
struct StepBlock {
  using C = Compute<T>;
  // Vectors are not made of float64.
  using Piece = std::conditional_t<sizeof(T) == 8, float, T>;
  static constexpr int kPieces = sizeof(T) / sizeof(Piece);

  const Step& p;
  const StepTiles& tiles;
  int64_t first, c0;     // batch row and channel
  int rows, width;       // that exist
  int c, row, row_step;  // this thread computes channel c of every so many rows
  int head;              // of c, among those of the block

  CK_DEVICE StepBlock(const Step& p, const StepTiles& tiles) : p(p), tiles(tiles) {
    const int64_t columns = ceil_div(p.channels, tiles.width);
    first = blockIdx.x / columns * tiles.rows;
    c0 = blockIdx.x % columns * tiles.width;
    rows = static_cast<int>(min(tiles.rows, p.batch - first));
    width = static_cast<int>(min(tiles.width, p.channels - c0));
    const int full = static_cast<int>(tiles.width);
    c = threadIdx.x % full;
    row = threadIdx.x / full;
    row_step = blockDim.x / full;
    head = static_cast<int>((c0 + c) / p.head_channels() - first_head());
  }

  CK_DEVICE int64_t first_head() const { return c0 / p.head_channels(); }
  CK_DEVICE C* filters() const { return reinterpret_cast<C*>(shared_memory()); }
  CK_DEVICE T* held() const { return reinterpret_cast<T*>(shared_memory() + tiles.filter_bytes); }

  // The row of the state that batch row b continues from. state_row is not validated on the host; it is clamped.
  CK_DEVICE int64_t source(int64_t b) const {
    return p.state_row == nullptr ? b : min(max(p.state_row[b], int64_t{0}), p.batch - 1);
  }

  CK_DEVICE Sequence sequence(int64_t b) const {
    return {0, 0, 1, p.position == nullptr ? kUnbounded : -p.position[b * p.position_stride]};
  }

  // A lane per tap, and as many filters per warp as there are lanes for.
  CK_DEVICE void make_filters() const {
    const int64_t K = p.taps.taps;
    int lanes = 1;
    while (lanes < 32 && lanes < K) lanes *= 2;
    const int lane = threadIdx.x % lanes, heads = static_cast<int>(tiles.heads);
    const int count = heads * (p.per_row() ? rows : 1);
    // All lanes of a warp make as many turns.
    for (int base = threadIdx.x / 32 * (32 / lanes); base < count; base += blockDim.x / lanes) {
      const int i = base + threadIdx.x % 32 / lanes;
      const int64_t b = first + (i < count ? i / heads : 0), h = first_head() + i % heads;
      const bool exists = i < count && h < p.heads;
      const FilterAt f(p, b, 0, h);
      const Sequence own = sequence(b);
      const Statistics<C> statistics = warp_statistics<C>(p, f, 0, lane, own, lanes, exists);
      for (int64_t j = lane; j < (exists ? K : 0); j += lanes)
        filters()[i * K + j] = tap_of(p, f, 0, j, statistics, own).value();
    }
  }

  // z of several rows of this thread, from the block's row i on: they are read together.
  CK_DEVICE void inputs(C (&z)[kStepAhead], int i) const {
#pragma unroll
    for (int k = 0; k < kStepAhead; ++k)
      z[k] = exists(i + k * row_step) ? gated<T>(p, first + i + k * row_step, 0, c0 + c, p.gate_activation) : C{0};
  }

  CK_DEVICE bool exists(int i) const { return i < rows && c < width; }

  // y[b, c], b = first + i, from z and rows of the old state that are `pitch` numbers apart.
  CK_DEVICE void output(int i, C z, const T* old, int64_t pitch) const {
    const int64_t b = first + i, K = p.taps.taps, on = p.taps.dilation * pitch;
    C total = 0;
    if (tiles.heads > 0) {
      const C* const filter = filters() + ((p.per_row() ? i * tiles.heads : 0) + head) * K;
#pragma unroll 4
      for (int64_t j = 0; j < K - 1; ++j) total += filter[j] * widen(old[j * on]);
      total += filter[K - 1] * z;
    } else {
      const FilterAt f(p, b, 0, first_head() + head);
      const Sequence own = sequence(b);
      const Statistics<C> statistics = statistics_of<C>(p, f, 0, own);
#pragma unroll 1
      for (int64_t j = 0; j < K; ++j)
        total += tap_of(p, f, 0, j, statistics, own).value() * (j < K - 1 ? widen(old[j * on]) : z);
    }
    if (p.bias != nullptr) total += load_as<C>(p.bias, c0 + c, p.bias_dtype);
    if (p.finish.any()) total = FinishAt<T>(p.finish, b, 0, c0 + c).finished(total);
    *at<T>(p.y, b, 0, c0 + c) = narrow<T>(total);
  }

  // Row r of a state, from the block's first channel on.
  CK_DEVICE int64_t state_at(int64_t b, int64_t r) const { return (b * p.taps.span() + r) * p.channels + c0; }

  // This thread's channel of a state.
  CK_DEVICE const T* old_state(int i) const {
    return static_cast<const T*>(p.state) + state_at(source(first + i), 0) + c;
  }
  CK_DEVICE const T* held_state(int i) const { return held() + i * tiles.pitch * tiles.width + c; }

  CK_DEVICE void store_newest(int i, C z) const {
    static_cast<T*>(p.next_state)[state_at(first + i, p.taps.span() - 1) + c] = narrow<T>(z);
  }

  // move(batch row, row, element of the vector, pieces of it that exist), for this thread's vectors of `depth` rows of
  // `count` states.
  template <class Move>
  CK_DEVICE void each_vector(int count, int depth, const Move& move) const {
    if (depth <= 0) return;
    const int vectors = static_cast<int>(tiles.width) / kVector<T>, e = threadIdx.x % vectors * kVector<T>;
    const int groups = blockDim.x / vectors, rows_on = groups / depth, on = groups % depth;
    int i = threadIdx.x / vectors / depth, r = threadIdx.x / vectors % depth;
    while (i < count) {
      move(i, r, e, min(width - e, kVector<T>) * kPieces);
      i += rows_on;
      r += on;
      if (r >= depth) ++i, r -= depth;
    }
  }

  // Begins to copy `depth` rows, from row r0 on, of the states that batch rows b0 to b0 + count of the block continue
  // from; `pitch` rows are held of each.
  CK_DEVICE void load(int b0, int count, int64_t r0, int depth, int pitch) const {
    each_vector(count, depth, [&](int i, int r, int e, int pieces) {
      const T* const from = static_cast<const T*>(p.state) + state_at(source(first + b0 + i), r0 + r) + e;
      T* const to = held() + (int64_t{i} * pitch + r) * tiles.width + e;
      stage_pieces(reinterpret_cast<Piece*>(to), reinterpret_cast<const Piece*>(from), pieces, p.vector_bytes);
    });
    cp_async_commit();
  }

  // Stores `depth` of the `pitch` rows held of each state, from `from` on, as rows r0 and following of the new states.
  CK_DEVICE void store(int b0, int count, int64_t r0, int depth, int pitch, int from) const {
    each_vector(count, depth, [&](int i, int r, int e, int pieces) {
      uint32_t words[4];
      load_vector(words, held() + (int64_t{i} * pitch + from + r) * tiles.width + e);
      T* const to = static_cast<T*>(p.next_state) + state_at(first + b0 + i, r0 + r) + e;
      store_pieces(reinterpret_cast<Piece*>(to), words, pieces, p.vector_bytes);
    });
  }
};

// Where rows continue from other rows' states, a block has all batch rows of its channels, and writes nothing that one
// of its threads has still to read. States that fit into shared memory are read whole before any is written; otherwise
// a few rows at a time, oldest first: those that are written are older than those that are still read.
template <class T>
CK_GLOBAL(kStepThreads, 1)
void step(const CK_PARAM Step p, const CK_PARAM StepTiles tiles) {
  using C = Compute<T>;
  const StepBlock<T> block(p, tiles);
  const int64_t span = p.taps.span();
  const int turn = kStepAhead * block.row_step, pitch = static_cast<int>(tiles.pitch);
  const bool whole = tiles.whole(span);
  C z[kStepAhead];
  if (whole) block.load(0, block.rows, 0, static_cast<int>(span), pitch);
  block.inputs(z, block.row);
  if (tiles.heads > 0) block.make_filters();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = block.row; block.exists(i); i += turn) {
    if (i != block.row) block.inputs(z, i);
#pragma unroll 1
    for (int k = 0; k < kStepAhead && block.exists(i + k * block.row_step); ++k) {
      const int row = i + k * block.row_step;
      C own = z[0];
#pragma unroll
      for (int n = 1; n < kStepAhead; ++n) own = n == k ? z[n] : own;
      block.output(row, own, whole ? block.held_state(row) : block.old_state(row), whole ? tiles.width : p.channels);
      if (whole && span > 0) block.store_newest(row, own);
    }
  }
  if (whole) {
    block.store(0, block.rows, 0, static_cast<int>(span) - 1, pitch, 1);
    return;
  }
  __syncthreads();
  const int held = static_cast<int>(tiles.held);
  for (int64_t r = 0; r < span - 1; r += tiles.depth) {
    const int depth = static_cast<int>(min(tiles.depth, span - 1 - r));
    // More than one turn only if a row is held at a time, which is not one of those that are written.
    for (int b = 0; b < block.rows; b += held) {
      const int count = min(held, block.rows - b);
      block.load(b, count, r + 1, depth, depth);
      cp_async_wait<0>();
      __syncthreads();
      block.store(b, count, r, depth, depth, 0);  // a thread what it has copied itself
    }
  }
  for (int i = block.row; block.exists(i); i += block.row_step)
    block.store_newest(i, gated<T>(p, block.first + i, 0, block.c0 + block.c, p.gate_activation));
}

}  // namespace ck::cuda
