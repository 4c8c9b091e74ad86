// Filters that all positions share, positions side by side in memory: a warp walks tiles of a few channel rows, staged
// in shared memory with what their windows reach, and each lane slides a window over 8 consecutive positions.
#pragma once

#include <type_traits>

#include "csrc/common/switch.h"
#include "csrc/cuda/conv/time_window.cuh"

namespace ck::cuda {

// Where a tile lies: from position t of batch row b on.
struct TimePlace {
  int64_t b;
  int t;

  // Returns whether it is of the same row.
  CK_DEVICE bool advance(const TimeTiles& g, int time) {
    t += kEight * g.lanes;
    if (t < time) return true;
    t = 0;
    ++b;
    return false;
  }
};

// What a warp does: `count` tiles of a block of channel rows.
struct TimeWork {
  int64_t c0, owner;
  TimePlace start;
  int64_t piece;  // number of the group among those of all owners
  int window, count;
  bool exists;  // warps beyond the last piece have none

  // Warps: channel blocks, then blocks of chunks of the window, then groups, then owners.
  CK_DEVICE TimeWork(const Problem& p, const TimeTiles& g, int64_t groups, int64_t windows) {
    const int64_t number = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
    const int64_t blocks = g.channel_blocks(p.channels), all = p.owner_batch() * g.tiles, each = ceil_div(all, groups);
    c0 = number % blocks * g.rows();
    window = static_cast<int>(number / blocks % windows);
    piece = number / blocks / windows;
    owner = piece / groups;
    const int64_t first = piece % groups * each;
    exists = owner < p.owners();
    count = exists ? static_cast<int>(max(min(each, all - first), int64_t{0})) : 0;
    start = {owner + first / g.tiles, static_cast<int>(first % g.tiles) * kEight * g.lanes};
  }
};

// What a lane works on, and where.
struct TimeLane {
  int part, row;  // its chunk of the tile, and its channel row
  int stage_bytes;
  uint8_t* masks;
  float* filters;  // of the warp's rows
  float* filter;   // of the lane's row
  char* tiles;     // of the warp

  // For each chunk of a window the elements that taps read, as bits.
  CK_DEVICE explicit TimeLane(const TimeTiles& g) {
    char* const shared = shared_memory();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    part = lane % g.lanes;
    row = lane / g.lanes;
    stage_bytes = opaque(g.stage_bytes());  // a division, which is otherwise made for every tile
    masks = reinterpret_cast<uint8_t*>(shared);
    filters = reinterpret_cast<float*>(shared + g.mask_bytes() + warp * g.warp_bytes);
    filter = filters + row * g.filter_pitch;
    tiles = reinterpret_cast<char*>(filters) + g.filter_bytes();
    for (int n = threadIdx.x; n < g.chunks; n += blockDim.x) {
      unsigned mask = 0;
      for (int u = 0; u < kEight; ++u) mask |= unsigned{g.tap_at(kEight * n + u) >= 0} << u;
      masks[n] = static_cast<uint8_t>(mask);
    }
    __syncthreads();
  }

  // The lane's row of the tile in a slot.
  CK_DEVICE char* tile(const TimeTiles& g, int slot) const { return tiles + slot * stage_bytes + row * g.row_bytes; }

  // The filter of the lane's row where taps are few.
  CK_DEVICE void load_few(float (&values)[kEight], const TimeTiles& g) const {
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      if (j < static_cast<int>(g.taps.taps)) values[j] = filter[g.shift + j];
  }

  // The first chunks of a tile are the last ones of the tile before, if both are of one row.
  template <class T>
  CK_DEVICE void move_on(const TimeTiles& g, char* from, char* to) const {
    constexpr int kCount = kEight / kVector<T>;
#pragma unroll 1
    for (int i = part; i < g.chunks; i += g.lanes)
#pragma unroll
      for (int v = 0; v < kCount; ++v)
        *vector_at<T>(to, i * kCount + v) = *vector_at<T>(from, (g.lanes + i) * kCount + v);
  }

  // The filters of the warp's channels, by the warp; value j lies where the window has what tap j reads.
  CK_DEVICE void fill(const Problem& p, const TimeTiles& g, bool transposed, const TimeWork& work) const {
    const int64_t K = p.taps.taps;
    const int lane = threadIdx.x % 32;
    const Sequence anywhere{0, 0, 0, kUnbounded};
    for (int r = 0; r < g.rows() && work.c0 + r < p.channels; ++r) {
      const FilterAt f(p, work.owner, 0, (work.c0 + r) / p.head_channels());
      const Statistics<float> statistics = warp_statistics<float>(p, f, 0, lane, anywhere);
      for (int64_t j = lane; j < K; j += 32)
        filters[r * g.filter_pitch + g.element_of(transposed ? K - 1 - j : j)] =
            tap_of(p, f, 0, j, statistics, anywhere).value();
    }
  }
};

// Where a lane's row lies in the tiles that take turns: now, next, and in the one after that, which was the last.
struct TimeTurns {
  char *now, *next, *last;

  CK_DEVICE TimeTurns(const TimeTiles& g, const TimeLane& self)
      : now(self.tile(g, 0)), next(self.tile(g, 1)), last(self.tile(g, 2)) {}

  CK_DEVICE void advance() {
    char* const free = last;
    last = now;
    now = next;
    next = free;
  }
};
static_assert(kTimeStages == 3);

// Starts the copy of a lane's share of its row, if the channel exists: a vector begins in the row of positions, or lies
// outside. line: where position 0 of the row is; `anywhere`: an address like it. `continued`: what the tile before has
// as well is moved from there.
template <class T>
CK_DEVICE void stage_row(const Problem& p, const TimeTiles& g, const TimeLane& self, const T* line, const T* anywhere,
                         int t, bool exists, bool continued, char* row) {
  const int start = g.window_start(t), time = static_cast<int>(p.time);
  const int first = continued ? g.chunks * kEight : 0, elements = (g.lanes + g.chunks) * kEight;
  const int step = g.lanes * kVector<T>;
  int e = first + self.part * kVector<T>;
  line += start;
  if (exists && continued && start + elements <= time && p.vector_bytes == 16) {
#pragma unroll
    for (int n = 0; n < kEight / kVector<T>; ++n, e += step)
      cp_async<16>(vector_at<T>(row, e / kVector<T>), line + e, true);
    return;
  }
  const int begin = max(-start, 0);
  const int end = exists ? min(time - start, elements) : 0;
#pragma unroll 1
  for (e = opaque(e); e < elements; e += step) {
    const bool inside = e >= begin && e < end;
    stage_pieces(vector_at<T>(row, e / kVector<T>)->at, inside ? line + e : anywhere, inside ? end - e : 0,
                 p.vector_bytes);
  }
}

// kReady: rows are gated and masked on their way, once, into float32; otherwise they are copied as they are.
template <class T, bool kReady, bool kPacked>
CK_GLOBAL(32 * kTimeWarps, kPacked ? 4 : 5)
void time_forward(const CK_PARAM Forward p, const CK_PARAM TimeTiles g, int64_t groups) {
  using E = std::conditional_t<kReady, float, T>;
  const TimeLane self(g);
  const TimeWork work(p, g, groups, 1);
  if (work.count == 0) return;
  const int64_t c = work.c0 + self.row;
  const int time = static_cast<int>(p.time);
  const bool exists = c < p.channels;
  self.fill(p, g, false, work);
  const float bias = p.bias != nullptr && exists ? load_as<float>(p.bias, c, p.bias_dtype) : 0.0f;
  TimePlace place = work.start, next = place;
  const T* line = at<const T>(p.x, next.b, 0, c);
  T* to = at<T>(p.y, place.b, 0, c);
  bool next_continues = false, continues = false;
  const auto stage = [&](int tile, char* row) {
    if (tile < work.count) {
      stage_row<T>(p, g, self, line, static_cast<const T*>(p.x.data), next.t, exists, next_continues, row);
      next_continues = next.advance(g, time);
      if (!next_continues) line += p.x.batch;
    }
    cp_async_commit();
  };
  TimeTurns turns(g, self);
  // Of a window of few taps.
  float filter[kEight] = {};
  const bool few = !kPacked && g.few_taps();
  if (few) {
    __syncwarp();
    self.load_few(filter, g);
  }
  if constexpr (!kReady) {
    stage(0, turns.now);
    stage(1, turns.next);
  }
  for (int tile = 0; tile < work.count; ++tile) {
    char* const row = turns.now;
    [[maybe_unused]] const int64_t b = place.b;
    const int t = place.t + kEight * self.part;
    if constexpr (kReady) {
      const int start = g.window_start(place.t);
      for (int n = self.part; n < g.lanes + g.chunks; n += g.lanes) {
        const int s = start + n * kEight;
        // A channel that does not exist reads channel 0; its result is not stored.
        const int64_t from = exists ? c : 0;
        const ChunkInputs<T, false> inputs(p, b, s, at<const T>(p.x, b, s, from),
                                           p.gate.data == nullptr ? nullptr : at<const T>(p.gate, b, s, from),
                                           kVector<T>);
#pragma unroll
        for (int v = 0; v < kEight; v += kVector<float>) {
          Words<float> z;
#pragma unroll
          for (int k = 0; k < kVector<float>; ++k) z.at[k] = inputs.z(v + k);
          *vector_at<float>(row, (n * kEight + v) / kVector<float>) = z;
        }
      }
    } else {
      cp_async_wait<kTimeStages - 2>();
      __syncwarp();
      if (continues) self.template move_on<T>(g, turns.last, row);
    }
    T* const here = to + t;
    continues = place.advance(g, time);
    if (!continues) to += p.y.batch;
    __syncwarp();
    if constexpr (!kReady) {
      stage(tile + 2, turns.last);
      turns.advance();
    }
    float sum[kEight];
#pragma unroll
    for (int i = 0; i < kEight; ++i) sum[i] = bias;
    if (few) {
      FewTaps<E>(row, self.part, g).for_each(g, [&](int j, int, const float* window) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) sum[i] += filter[j] * window[i];
      });
    } else {
      for_parts<kPacked>(p, g, t, [&](const ChunkPart& part) {
        correlate(sum, ChunkWindow<E, kPacked>(row, self.part, part), g, self.masks, self.filter);
      });
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum[i] += bias;
    }
    if (exists) store_chunk<T>(p, here, t, sum);
    if constexpr (kReady) __syncwarp();
  }
}

}  // namespace ck::cuda
