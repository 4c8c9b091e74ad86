// How the warps of a block for warpgroups wait for each other: one warp copies to a ring of stages in shared memory,
// two warpgroups take turns with their products.
#pragma once

#include "csrc/cuda/attention/common.cuh"
#include "csrc/cuda/attention/plan.h"
#include "csrc/cuda/device/warpgroup.cuh"

namespace ck::cuda {

// A block's own tile, and the stages of its ring: full once all bytes have come, free once all 8 warps have read them.
struct RingSignals {
  uint64_t own_full, own_free, full[2 * kMostStages], free[2 * kMostStages];
  int spoiled[2];  // the last even, or odd, round in which hidden rows were not all finite, plus 1
};

// By all threads of a block. arrivals: of those that fill a stage.
CK_DEVICE void begin_signals(RingSignals& signals, int stages, int arrivals) {
  if (threadIdx.x == 0) {
    mbarrier_init(&signals.own_full, 1);
    mbarrier_init(&signals.own_free, kWarpgroupWarps);
    for (int n = 0; n < stages; ++n) {
      mbarrier_init(&signals.full[n], arrivals);
      mbarrier_init(&signals.free[n], kWarpgroupWarps);
    }
    signals.spoiled[0] = signals.spoiled[1] = 0;
    fence_mbarrier_init();
  }
  __syncthreads();
}

// The stage that comes next. Wait for a full one with its parity, for a free one with the other.
struct RingPlace {
  int stages, stage = 0;
  unsigned trip = 0;

  CK_DEVICE unsigned parity() const { return trip & 1; }
  CK_DEVICE int before() const { return stage == 0 ? stages - 1 : stage - 1; }
  CK_DEVICE void advance() {
    if (++stage == stages) stage = 0, ++trip;
  }
};

// The turns of two warpgroups, as seen by one of them: what one starts between begin() and end() does not mix with what
// the other one starts.
struct WarpgroupTurn {
  int own, other, in_group;  // named barriers
  bool second;

  CK_DEVICE explicit WarpgroupTurn(int group)
      : own(1 + group), other(2 - group), in_group(4 + group), second(group == 1) {
    if (second) end();  // the first one begins
  }
  CK_DEVICE void begin() const { barrier_sync(own, kTurnThreads); }
  CK_DEVICE void end() const { barrier_arrive(other, kTurnThreads); }
  // Both wait for each other, outside of a turn.
  CK_DEVICE void meet() const { barrier_sync(3, kTurnThreads); }
  // The second one has ended a turn more than the first one has begun.
  CK_DEVICE void finish() const {
    if (!second) begin();
  }
};

// How many tiles of kKeys keys a tile of queries meets, from `first` on.
template <int kKeys>
CK_DEVICE int tiles_of_keys(const Attention& p, const AttentionTile& tile, int& first) {
  if (tile.count <= 0) return 0;
  const Range keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
  first = keys.first / 8 * 8;
  return keys.first < keys.end ? static_cast<int>(ceil_div(keys.end - first, kKeys)) : 0;
}

// How many tiles of kQueries queries see some key of a tile of keys, and all queries that do.
template <int kQueries>
CK_DEVICE int tiles_of_queries(const Attention& p, const AttentionTile& tile, Range& queries) {
  if (tile.count <= 0) return 0;
  queries = seeing_queries(p, tile, max(tile.first, tile.key_begin), tile.first + tile.count);
  return queries.first < queries.end ? static_cast<int>(ceil_div(queries.end - queries.first, kQueries)) : 0;
}

}  // namespace ck::cuda
