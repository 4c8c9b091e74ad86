// Steps of every other kind: several positions, packed sequences, and states of a pool, with rows besides the window.
#pragma once

#include <cstring>

#include "csrc/cuda/conv/pieces.cuh"
#include "csrc/cuda/conv/plain.cuh"

namespace ck::cuda {

constexpr int kServeAhead = 4;  // newest inputs that a thread reads ahead

// kRuns: of some pieces threads compute runs of positions, which takes more registers.
template <class T, bool kRuns>
struct ServeBlock : PiecesBlock<T> {
  using Base = PiecesBlock<T>;
  using C = Compute<T>;
  using Piece = typename Base::Piece;
  using Base::at;
  using Base::c;
  using Base::c0;
  using Base::cut;
  using Base::p;
  using Base::row_step;
  using Base::rows;
  using Base::states;
  using Base::tiles;
  using Base::whole;
  using Base::width;

  using Base::Base;

  CK_DEVICE bool runs(const ServedPiece& own) const { return kRuns && tiles.runs(p, own.to - own.from); }

  CK_DEVICE C input(const ServedPiece& own, int64_t t, int64_t channel) const {
    return gated<T>(p, own.b, own.begin + t, c0 + channel, p.gate_activation);
  }

  // The newest inputs of several items of this thread, which are read together; runs read theirs themselves.
  CK_DEVICE void inputs(C (&z)[kServeAhead], ServedItems found, int item, int total) const {
#pragma unroll
    for (int k = 0; k < kServeAhead; ++k, item += row_step) {
      z[k] = 0;
      if (item >= total || c >= width) continue;
      const int u = Base::within(found, item);
      const ServedPiece own = at(found.i);
      if (own.slot >= 0 && !runs(own)) z[k] = input(own, own.from + u, c);
    }
  }

  // Row r of what a sequence continues from, from the block's first channel on.
  CK_DEVICE const T* old_row(const ServedPiece& own, int64_t r) const {
    return Base::slot_row(Base::source(own.sequence, own.slot), r);
  }

  // Where row r and channel e of a state lie in shared memory, which has `depth` rows of each, `pitch` rows apart.
  CK_DEVICE T* held_at(int i, int r, int e, int depth, int64_t pitch) const {
    const int64_t full = tiles.width, row = i * pitch;
    return Base::held() +
           (tiles.layout == StepLayout::kRows ? (row + r) * full + e : row * full + int64_t{e} * depth + r);
  }

  // This thread's channel of the old state of piece i, from the row of position 0 on, and how far apart rows are.
  struct Window {
    const T* at;
    int64_t step;

    CK_DEVICE C operator[](int64_t s) const { return widen(at[s * step]); }
  };
  CK_DEVICE Window window(int i, const ServedPiece& own) const {
    const Rows& pool = p.states.pool;
    const int64_t row = states - own.length + own.on;
    if (!whole) return {old_row(own, row) + c * pool.channel, pool.time};
    const int64_t step = tiles.layout == StepLayout::kRows ? tiles.width : 1;
    return {held_at(i, 0, c, states, tiles.pitch) + row * step, step};
  }

  CK_DEVICE void output(int item, int i, int u, C z) const {
    const ServedPiece own = at(i);
    if constexpr (kRuns)
      if (runs(own)) return output_run(i, own, u);
    const int64_t t = own.from + u;
    if (own.slot < 0) return store(own, t, 0);
    const Window old = window(i, own);
    Base::output(item, Base::position(own, t), z, [&](int64_t j) {
      const int64_t s = p.taps.source(t, j);
      return s < 0 ? old[s] : input(own, s, c);
    });
  }

  CK_DEVICE void output_run(int i, const ServedPiece& own, int u) const {
    const int64_t dilation = p.taps.dilation;
    const int64_t t = own.from + PlainRuns(own.to - own.from, dilation).first_position(p, u);
    C total[kPlainRun] = {};
    const Window old = window(i, own);
    if (own.slot >= 0)
      add_windows(total, Base::filter(0), 1, p.taps.taps, [&](C(&z)[kPlainRun], int64_t m, int64_t count) {
        const int64_t s = p.taps.source(t, m);
        load_inputs<T>(z, p, own.b, own.begin + s, dilation, count, c0 + c,
                       Sequence{0, own.begin, own.begin + own.length, own.begin}, p.gate_activation);
        if (s < 0)
#pragma unroll
          for (int k = 0; k < kPlainRun; ++k)
            if (k < count && s + k * dilation < 0) z[k] = old[s + k * dilation];
      });
#pragma unroll
    for (int k = 0; k < kPlainRun; ++k)
      if (t + k * dilation < own.to) store(own, t + k * dilation, total[k]);
  }

  // y, which is 0 without a slot.
  CK_DEVICE void store(const ServedPiece& own, int64_t t, C total) const {
    if (own.slot >= 0)
      Base::store(own.b, own.begin + t, total);
    else
      *ck::cuda::at<T>(p.y, own.b, own.begin + t, c0 + c) = narrow<T>(C{0});
  }

  // use(i, row, channel) for this thread's vectors, or numbers, of `depth` rows of `count` states.
  template <class Use>
  CK_DEVICE void each_unit(int count, int depth, const Use& use) const {
    const int full = static_cast<int>(tiles.width);
    if (tiles.layout == StepLayout::kRows) {
      Base::deal(count, depth, full / kVector<T>, [&](int i, int r, int lane) { use(i, r, lane * kVector<T>); });
    } else {
      const int unit = tiles.layout == StepLayout::kRun ? kVector<T> : 1;
      Base::deal(count, full * depth / unit, 1, [&](int i, int n, int) { use(i, n * unit % depth, n * unit / depth); });
    }
  }

  // Numbers of the vector from row r and channel e on that exist.
  CK_DEVICE int existing(int r, int e) const {
    return min(tiles.layout == StepLayout::kRows ? width - e : (width - e) * states - r, kVector<T>);
  }

  // Begins to copy what lies at row r and channel e of a state; where there is none, zeros.
  CK_DEVICE void copy(T* to, const ServedPiece& own, int64_t r, int e, int count) const {
    const T* const from = old_row(own, max(r, int64_t{0})) + e * p.states.pool.channel;
    if (tiles.layout != StepLayout::kNumbers)
      stage_pieces(reinterpret_cast<Piece*>(to), reinterpret_cast<const Piece*>(from),
                   r < 0 ? 0 : count * Base::kPieces, p.vector_bytes);
    else if (e < width)
      *to = r < 0 ? T{} : *from;
  }

  CK_DEVICE void load() const {
    each_unit(rows, states, [&](int i, int r, int e) {
      const ServedPiece own = at(i);
      if (own.first()) copy(held_at(i, r, e, states, tiles.pitch), own, r, e, existing(r, e));
    });
    cp_async_commit();
  }

  // A number of the state after n positions of the sequence of piece i.
  CK_DEVICE T number(int i, const ServedPiece& own, int64_t n, int r, int e) const {
    const int64_t s = r - states + n, from = states - own.length + own.on + s;
    if (s >= 0) return narrow<T>(input(own, s, e));
    if (from < 0) return T{};
    if (whole) return *held_at(i, static_cast<int>(from), e, states, tiles.pitch);
    return old_row(own, from)[e * p.states.pool.channel];
  }

  // A state that is left in a slot: that after n positions of a sequence. Without a slot it is not.
  struct Left {
    ServedPiece own;
    int64_t n, slot;
  };

  // Leaves states of `count` pieces from b on, left(piece), or of them no more than the newest rows. Rows of channels
  // are copied in vectors from what is held, and what comes from x number by number, as threads read it.
  template <class LeftOf>
  CK_DEVICE void leave(int b, int count, int newest, const LeftOf& left) const {
    const int full = static_cast<int>(tiles.width), oldest = states - newest;
    if (tiles.layout == StepLayout::kRun)
      return each_unit(count, states, [&](int i, int r, int e) { store_run(b + i, left(b + i), r, e); });
    const bool vectors = whole && tiles.layout == StepLayout::kRows;
    if (vectors) each_unit(count, states, [&](int i, int r, int e) { store_old(b + i, left(b + i), r, e); });
    const auto one = [&](int i, int r, int e) {
      const Left state = left(b + i);
      if (state.slot >= 0 && e < width && !(vectors && r < states - state.n))
        Base::slot_row(state.slot, r)[e * p.states.pool.channel] = number(b + i, state.own, state.n, r, e);
    };
    if (tiles.layout == StepLayout::kRows)
      Base::deal(count, newest, full, [&](int i, int r, int lane) { one(i, oldest + r, lane); });
    else
      each_unit(count, newest, [&](int i, int r, int e) { one(i, oldest + r, e); });
  }

  // A vector of channels of a row that was there before.
  CK_DEVICE void store_old(int i, const Left& state, int r, int e) const {
    const int64_t from = r + state.own.on - state.own.length + state.n;
    if (state.slot < 0 || r >= states - state.n) return;
    uint32_t words[4] = {};
    if (from >= 0) load_vector(words, held_at(i, static_cast<int>(from), e, states, tiles.pitch));
    store_pieces(reinterpret_cast<Piece*>(Base::slot_row(state.slot, r) + e), words, existing(r, e) * Base::kPieces,
                 p.vector_bytes);
  }

  // A vector of rows of channels.
  CK_DEVICE void store_run(int i, const Left& state, int r, int e) const {
    if (state.slot < 0) return;
    T* const to = Base::slot_row(state.slot, r) + e * p.states.pool.channel;
    const int count = existing(r, e);
    alignas(kVectorBytes) T numbers[kVector<T>] = {};
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      if (k < count) numbers[k] = number(i, state.own, state.n, r, e);
      if (++r == states) ++e, r = 0;
    }
    uint32_t words[4];
    std::memcpy(words, numbers, sizeof words);
    store_pieces(reinterpret_cast<Piece*>(to), words, count * Base::kPieces, p.vector_bytes);
  }

  // States on the way, which are made of the old ones.
  CK_DEVICE void save() const {
    for (int64_t m = 0; m < p.states.saves; ++m) {
      const int64_t place = p.states.save_at[m], slot = p.states.save_slot[m];
      if (slot < 0 || slot >= p.states.slots) continue;
      for (int i = 0; i < rows; ++i) {
        const ServedPiece own = at(i);
        const int64_t n = place - own.begin;
        if (own.first() && n > 0 && n <= own.length) leave(i, 1, states, [&](int) { return Left{own, n, slot}; });
      }
    }
  }

  // Rows that have to be stored besides those that are copied in vectors, at most.
  CK_DEVICE int newest() const {
    return cut || tiles.layout != StepLayout::kRows ? states : static_cast<int>(min(p.states.width, p.time));
  }

  // What sequences have become, of which no more than the newest rows are to be stored.
  CK_DEVICE void update(int newest) const {
    leave(0, rows, newest, [&](int i) {
      const ServedPiece own = at(i);
      return Left{own, own.length, own.first() ? own.slot : -1};
    });
  }

  // Moves states that are not held whole up, or down, by a few rows at a time: those that are written have been read.
  // Then a block has one piece, or all, uncut.
  CK_DEVICE void move() const {
    const int kept = static_cast<int>(max(states - at(0).length, int64_t{0}));
    const int held = static_cast<int>(tiles.held), depth = static_cast<int>(tiles.depth);
    for (int done = 0; done < kept; done += depth) {
      // More than one turn only if a row is held at a time, which is not one of those that are written.
      for (int b = 0; b < rows; b += held) {
        const int count = min(held, rows - b);
        const auto each = [&](const auto& use) {
          each_unit(count, depth, [&](int i, int r, int e) {
            const ServedPiece own = at(b + i);
            const int to = own.on >= 0 ? done + r : kept - done - depth + r;
            if (own.first() && to >= 0 && to < kept) use(own, to, e, held_at(i, r, e, depth, depth));
          });
        };
        each([&](const ServedPiece& own, int to, int e, T* shared) {
          copy(shared, own, to + own.on, e, existing(to, e));
        });
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        each([&](const ServedPiece& own, int to, int e, const T* shared) {  // a thread what it has copied itself
          T* const into = Base::slot_row(own.slot, to) + e * p.states.pool.channel;
          if (tiles.layout == StepLayout::kNumbers) {
            if (e < width) *into = *shared;
            return;
          }
          uint32_t words[4];
          load_vector(words, shared);
          store_pieces(reinterpret_cast<Piece*>(into), words, existing(to, e) * Base::kPieces, p.vector_bytes);
        });
      }
    }
    update(states - kept);
  }
};

// Of a multiprocessor, at the same time.
template <class T, bool kRuns>
constexpr int kServeBlocks = sizeof(T) == 8            ? 1
                             : kRuns || sizeof(T) == 4 ? 2
                                                       : 3;

template <class T, bool kRuns>
CK_GLOBAL(kServeThreads, (kServeBlocks<T, kRuns>))
void serve(const CK_PARAM Step p, const CK_PARAM StepTiles tiles) {
  using C = Compute<T>;
  const ServeBlock<T, kRuns> block(p, tiles);
  if (block.cut) block.find_pieces();
  if (block.whole) block.load();
  const int total = block.all_items();
  ServedItems found;
  C z[kServeAhead];
  block.inputs(z, found, block.row, total);
  if (tiles.heads > 0) block.make_filters(total, [&](int item) { return block.position_of(item); });
  cp_async_wait<0>();
  __syncthreads();
  for (int item = block.row; item < total && block.c < block.width; item += kServeAhead * block.row_step) {
    if (item != block.row) block.inputs(z, found, item, total);
#pragma unroll 1
    for (int k = 0; k < kServeAhead && item + k * block.row_step < total; ++k) {
      const int own = item + k * block.row_step, u = block.within(found, own);
      block.output(own, found.i, u, block.ahead(z, k));
    }
  }
  block.save();
  if (block.whole) return block.update(block.newest());
  __syncthreads();
  block.move();
}

}  // namespace ck::cuda
