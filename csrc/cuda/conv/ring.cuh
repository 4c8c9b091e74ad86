// A ring buffer of chunks of rows in shared memory, and the walk of a thread's window over it.
#pragma once

#include "csrc/common/switch.h"
#include "csrc/cuda/conv/quads.cuh"
#include "csrc/cuda/conv/staging.cuh"

namespace ck::cuda {

// Chunks of rows of kLaneRow channels in shared memory, overwritten in turn.
template <class E>
struct Ring {
  E* base;
  int chunks;

  // A block walks fewer than 2^31 rows; 64-bit division would take longer than the rest.
  CK_DEVICE E* chunk(int64_t number) const {
    return base + static_cast<uint32_t>(number) % static_cast<uint32_t>(chunks) * (kChunk * kLaneRow);
  }
  CK_DEVICE E* row(int64_t number) const {
    return chunk(static_cast<uint32_t>(number) / kChunk) + static_cast<uint32_t>(number) % kChunk * kLaneRow;
  }
  // The row after that at `at`.
  CK_DEVICE const E* next(const E* at) const { return at + kLaneRow < end() ? at + kLaneRow : at + kLaneRow - size(); }
  CK_DEVICE int size() const { return chunks * (kChunk * kLaneRow); }
  CK_DEVICE E* end() const { return base + size(); }
};

// Calls use(j, window, turn) for taps j = 0..taps-1, where row i of the window, window[(turn + i) % kRun], is ring row
// first + j + i. With kFast every row is loaded once: `turn` is known to the compiler, so that the window stays in
// registers, at the price of much code. Otherwise it is 0, and the window is loaded for every tap.
template <bool kFast, class E, class Use>
CK_DEVICE void walk(const Ring<E>& ring, int64_t first, int taps, int lane, const Use& use) {
  Quad window[kRun];
  const E* at = ring.row(first) + lane * kQuad;
  if constexpr (kFast) {
#pragma unroll
    for (int i = 0; i < kRun - 1; ++i, at = ring.next(at)) window[i] = load_quad(at);
    for (int j0 = 0; j0 < taps; j0 += kRun) {
#pragma unroll
      for (int turn = 0; turn < kRun; ++turn) {
        if (j0 + turn >= taps) break;
        window[(turn + kRun - 1) % kRun] = load_quad(at);
        at = ring.next(at);
        use(j0 + turn, window, turn);
      }
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < taps; ++j, at = ring.next(at)) {
      const E* row = at;
#pragma unroll
      for (int i = 0; i < kRun; ++i, row = ring.next(row)) window[i] = load_quad(row);
      use(j, window, 0);
    }
  }
}

// Which taps of the rows of a run read rows of the sequence that they are in. Only where a window crosses a boundary of
// packed sequences is there anything to ask.
struct Borders {
  bool whole = true;  // no window of the run crosses one
  int first[kRun], last[kRun];

  // Rows n .. n + kRun - 1 of a phase, and what they read by `taps`. By the warp, of which a lane looks at one row, for
  // all.
  CK_DEVICE Borders(const Problem& p, const Taps& taps, const Phase& phase, int64_t n) {
    if (p.offsets == nullptr) return;
    const int64_t t = phase.position(n + threadIdx.x % kRun);
    const Sequence s = sequence_of(p, t);
    whole = __all_sync(kAllLanes, !within(t, p.time) || (max(taps.source(t, 0), int64_t{0}) >= s.begin &&
                                                         min(taps.source(t, taps.taps - 1), p.time - 1) < s.end)) != 0;
    if (whole) return;
    const int from = static_cast<int>(taps.first_inside(t, s.begin)), to = static_cast<int>(taps.last_inside(t, s.end));
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      first[i] = __shfl_sync(kAllLanes, from, i);
      last[i] = __shfl_sync(kAllLanes, to, i);
    }
  }

  CK_DEVICE bool inside(int i, int j) const { return j >= first[i] && j < last[i]; }
};

// Walks the windows of a run: add(Bool<kFast>, j, window, turn), fast where no window crosses a boundary; otherwise
// `add` has to ask `borders`.
template <class E, class Add>
CK_DEVICE void walk_within(const Borders& borders, const Ring<E>& ring, int64_t first, int taps, int lane,
                           const Add& add) {
  if (borders.whole)
    walk<true>(ring, first, taps, lane,
               [&](int j, const Quad(&window)[kRun], int turn) { add(Bool<true>{}, j, window, turn); });
  else
    walk<false>(ring, first, taps, lane,
                [&](int j, const Quad(&window)[kRun], int turn) { add(Bool<false>{}, j, window, turn); });
}

}  // namespace ck::cuda
