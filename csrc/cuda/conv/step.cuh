// Decoding: one position per call, the state moved up in place, in one launch.
#pragma once

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/finish.cuh"
#include "csrc/cuda/conv/step_tiles.h"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

constexpr int kStepAhead = 8;  // rows of x that a thread reads ahead

// A position of x, which is `local` in its sequence.
struct StepPosition {
  int64_t b, t, local;
  Sequence sequence;  // of local positions
};

// What a thread of a step knows of its block, and what blocks of all steps do. Shared memory: the filters, [item, head,
// tap] or [head, tap], then the pieces if sequences are cut, then rows of states.
template <class T>
struct StepBlock {
  using C = Compute<T>;
  // Vectors are not made of float64.
  using Piece = std::conditional_t<sizeof(T) == 8, float, T>;
  static constexpr int kPieces = sizeof(T) / sizeof(Piece);

  const Step& p;
  const StepTiles& tiles;
  int64_t first, c0;     // piece of a sequence, and channel
  int rows, width;       // that exist
  int c, row, row_step;  // this thread computes channel c of every so many items
  int head;              // of c, among those of the block

  CK_DEVICE StepBlock(const Step& p, const StepTiles& tiles) : p(p), tiles(tiles) {
    const int64_t columns = ceil_div(p.channels, tiles.width);
    first = blockIdx.x / columns * tiles.rows;
    c0 = blockIdx.x % columns * tiles.width;
    rows = static_cast<int>(min(tiles.rows, tiles.total - first));
    width = static_cast<int>(min(tiles.width, p.channels - c0));
    const int full = static_cast<int>(tiles.width);
    c = threadIdx.x % full;
    row = threadIdx.x / full;
    row_step = blockDim.x / full;
    head = static_cast<int>((c0 + c) / p.head_channels() - first_head());
  }

  CK_DEVICE int64_t first_head() const { return c0 / p.head_channels(); }
  CK_DEVICE C* filters() const { return reinterpret_cast<C*>(shared_memory()); }
  CK_DEVICE T* held() const { return reinterpret_cast<T*>(shared_memory() + tiles.filter_bytes + tiles.piece_bytes); }

  // The slot that a sequence continues from. It is not validated on the host; it is clamped.
  CK_DEVICE int64_t source(int64_t sequence, int64_t slot) const {
    return p.states.source.data == nullptr ? slot : min(max(p.states.source[sequence], int64_t{0}), p.states.slots - 1);
  }

  CK_DEVICE int64_t first_row(int64_t sequence) const {
    return p.states.position.data == nullptr ? kUnbounded : -p.states.position[sequence];
  }

  // The filters of so many positions, position_of(item), or that all share. A lane per tap, and as many filters per
  // warp as there are lanes for.
  template <class PositionOf>
  CK_DEVICE void make_filters(int items, const PositionOf& position_of) const {
    const int64_t K = p.taps.taps, pitch = plain_pitch(K);
    int lanes = 1;
    while (lanes < 32 && lanes < K) lanes *= 2;
    const int lane = threadIdx.x % lanes, heads = static_cast<int>(tiles.heads);
    const int count = heads * (p.per_row() ? items : min(items, 1));
    // All lanes of a warp make as many turns.
    for (int base = threadIdx.x / 32 * (32 / lanes); base < count; base += blockDim.x / lanes) {
      const int i = base + threadIdx.x % 32 / lanes;
      const int64_t h = first_head() + i % heads;
      const bool exists = i < count && h < p.heads;
      const StepPosition of = position_of(i < count ? i / heads : 0);
      const FilterAt f(p, of.b, of.t, h);
      const Statistics<C> statistics = warp_statistics<C>(p, f, of.local, lane, of.sequence, lanes, exists);
      for (int64_t j = lane; j < (exists ? K : 0); j += lanes)
        filters()[i * pitch + j] = tap_of(p, f, of.local, j, statistics, of.sequence).value();
    }
  }

  CK_DEVICE const C* filter(int item) const {
    return filters() + ((p.per_row() ? item * tiles.heads : 0) + head) * plain_pitch(p.taps.taps);
  }

  // Stores y[b, t, c] from the sum of an item's position; before(j): what tap j reads, but the last reads z.
  template <class Before>
  CK_DEVICE void output(int item, const StepPosition& of, C z, const Before& before) const {
    const int64_t K = p.taps.taps;
    C total = 0;
    if (tiles.heads > 0) {
      const C* const values = filter(item);
#pragma unroll 4
      for (int64_t j = 0; j < K - 1; ++j) total += values[j] * before(j);
      total += values[K - 1] * z;
    } else {
      const FilterAt f(p, of.b, of.t, first_head() + head);
      const Statistics<C> statistics = statistics_of<C>(p, f, of.local, of.sequence);
#pragma unroll 1
      for (int64_t j = 0; j < K; ++j)
        total += tap_of(p, f, of.local, j, statistics, of.sequence).value() * (j < K - 1 ? before(j) : z);
    }
    store(of.b, of.t, total);
  }

  CK_DEVICE void store(int64_t b, int64_t t, C total) const {
    if (p.bias != nullptr) total += load_as<C>(p.bias, c0 + c, p.bias_dtype);
    if (p.finish.any()) total = FinishAt<T>(p.finish, b, t, c0 + c).finished(total);
    *at<T>(p.y, b, t, c0 + c) = narrow<T>(total);
  }

  // z[k] of the item k * row_step further, which are as many as are read ahead.
  template <int kCount>
  static CK_DEVICE C ahead(const C (&z)[kCount], int k) {
    C own = z[0];
#pragma unroll
    for (int n = 1; n < kCount; ++n) own = n == k ? z[n] : own;
    return own;
  }

  // move(i, r, lane) for every r < depth of i < count that is this thread's, which are dealt to groups of so many
  // lanes.
  template <class Move>
  CK_DEVICE void deal(int count, int depth, int lanes, const Move& move) const {
    if (depth <= 0) return;
    const int lane = threadIdx.x % lanes, groups = blockDim.x / lanes, rows_on = groups / depth, on = groups % depth;
    int i = threadIdx.x / lanes / depth, r = threadIdx.x / lanes % depth;
    while (i < count) {
      move(i, r, lane);
      i += rows_on;
      r += on;
      if (r >= depth) ++i, r -= depth;
    }
  }

  // move(i, row, element of the vector, pieces of it that exist), for this thread's vectors of `depth` rows of states.
  template <class Move>
  CK_DEVICE void each_vector(int depth, const Move& move) const {
    deal(rows, depth, static_cast<int>(tiles.width) / kVector<T>, [&](int i, int r, int lane) {
      const int e = lane * kVector<T>;
      move(i, r, e, min(width - e, kVector<T>) * kPieces);
    });
  }

  // This block's part of row r of a slot.
  CK_DEVICE T* slot_row(int64_t slot, int64_t r) const { return at<T>(p.states.pool, slot, r, c0); }
  CK_DEVICE T* held_row(int i, int64_t r) const { return held() + (i * tiles.pitch + r) * tiles.width; }
};

// One position of each batch row, whose state is as long as the window and fits into shared memory. Where rows continue
// from other rows' states, a block has all batch rows of its channels; states are read whole before any is written.
template <class T>
CK_GLOBAL(kStepThreads, 1)
void step(const CK_PARAM Step p, const CK_PARAM StepTiles tiles) {
  using C = Compute<T>;
  using Piece = typename StepBlock<T>::Piece;
  const StepBlock<T> block(p, tiles);
  const int span = static_cast<int>(tiles.depth);
  const auto exists = [&](int i) { return i < block.rows && block.c < block.width; };
  // z of several rows of this thread, from the block's row i on: they are read together.
  C z[kStepAhead];
  const auto inputs = [&](int i) {
#pragma unroll
    for (int k = 0; k < kStepAhead; ++k) {
      const int row = i + k * block.row_step;
      z[k] = exists(row) ? gated<T>(p, block.first + row, 0, block.c0 + block.c, p.gate_activation) : C{0};
    }
  };
  const auto position_of = [&](int i) -> StepPosition {
    return {block.first + i, 0, 0, {0, 0, 1, block.first_row(block.first + i)}};
  };
  block.each_vector(span, [&](int i, int r, int e, int pieces) {
    const int64_t b = block.first + i;
    stage_pieces(reinterpret_cast<Piece*>(block.held_row(i, r) + e),
                 reinterpret_cast<const Piece*>(block.slot_row(block.source(b, b), r) + e), pieces, p.vector_bytes);
  });
  cp_async_commit();
  inputs(block.row);
  if (tiles.heads > 0) block.make_filters(block.rows, position_of);
  cp_async_wait<0>();
  __syncthreads();
  for (int i = block.row; exists(i); i += kStepAhead * block.row_step) {
    if (i != block.row) inputs(i);
#pragma unroll 1
    for (int k = 0; k < kStepAhead && exists(i + k * block.row_step); ++k) {
      const int row = i + k * block.row_step;
      const C own = block.ahead(z, k);
      const T* const old = block.held_row(row, 0) + block.c;
      const int64_t on = p.taps.dilation * tiles.width;
      block.output(row, position_of(row), own, [&](int64_t j) { return widen(old[j * on]); });
      if (span > 0) block.slot_row(block.first + row, span - 1)[block.c] = narrow<T>(own);
    }
  }
  block.each_vector(span - 1, [&](int i, int r, int e, int pieces) {
    uint32_t words[4];
    load_vector(words, block.held_row(i, r + 1) + e);
    store_pieces(reinterpret_cast<Piece*>(block.slot_row(block.first + i, r) + e), words, pieces, p.vector_bytes);
  });
}

}  // namespace ck::cuda
