// How the warps of a block for warpgroups wait for each other: one warp copies to a ring of stages in shared memory,
// two warpgroups take turns with their products.
#pragma once

#include "csrc/cuda/attention/common.cuh"
#include "csrc/cuda/attention/plan.h"
#include "csrc/cuda/device/warpgroup.cuh"

namespace ck::cuda {

// A block's own tile, and the stages of its ring: full once all bytes have come, free once all 8 warps have read them.
struct alignas(16) RingSignals {
  uint64_t own_full, own_free, full[2 * kMostStages], free[2 * kMostStages];
  unsigned spoiled[2];  // the last even, or odd, number of an own tile with hidden rows that were not all finite

  // In the own tile of this number, from 1 on. A warpgroup is never more than one tile behind the other one.
  CK_DEVICE void spoil(unsigned number) { spoiled[number % 2] = number; }
  CK_DEVICE bool is_spoiled(unsigned number) const { return spoiled[number % 2] == number; }
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

// By a warp, when all lanes are done with it.
CK_DEVICE void release(uint64_t* signal) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(signal);
}

// The turns of two warpgroups, as seen by one of them: what one starts between begin() and end() does not mix with what
// the other one starts.
struct WarpgroupTurn {
  int group;  // 0 or 1

  CK_DEVICE explicit WarpgroupTurn(int group) : group(group) {
    if (group == 1) end();  // the first one begins
  }
  CK_DEVICE void begin() const { barrier_sync(1 + group, kTurnThreads); }
  CK_DEVICE void end() const { barrier_arrive(2 - group, kTurnThreads); }
  // Both wait for each other, outside of a turn.
  CK_DEVICE void meet() const { barrier_sync(3, kTurnThreads); }
  // The warps of this one wait for each other.
  CK_DEVICE void meet_own() const { barrier_sync(4 + group, 128); }
  // The second one has ended a turn more than the first one has begun.
  CK_DEVICE void finish() const {
    if (group == 0) begin();
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

}  // namespace ck::cuda
