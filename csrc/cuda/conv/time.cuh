// Filters that all positions share, positions side by side in memory: a warp walks tiles of a few channel rows, staged
// in shared memory with what their windows reach, and each lane slides a window over 8 consecutive positions.
#pragma once

#include <type_traits>

#include "csrc/common/switch.h"
#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/staging.cuh"
#include "csrc/cuda/conv/time_tiles.h"

namespace ck::cuda {

// 16 bytes.
template <class T>
struct alignas(16) Words {
  T at[kVector<T>];
};

// Vector v of a row in shared memory. Lanes read every second vector of float32, which must not be every second bank.
template <class E>
CK_DEVICE Words<E>* vector_at(char* row, int v) {
  return reinterpret_cast<Words<E>*>(row) + (sizeof(E) == 4 ? v + v / 8 : v);
}

template <class E>
CK_DEVICE void read_chunk(char* row, int n, float* to) {
  constexpr int kCount = kEight / kVector<E>;
#pragma unroll
  for (int v = 0; v < kCount; ++v) unpack_vector(to + v * kVector<E>, vector_at<E>(row, n * kCount + v)->at);
}

// Of a vector of positions from t on, those that exist.
template <class T>
CK_DEVICE int rest_of(const Problem& p, int t) {
  return min(static_cast<int>(p.time) - t, kVector<T>);
}

// Stores a lane's positions t .. t + 7 as far as they exist, at `to`.
template <class T>
CK_DEVICE void store_chunk(const Problem& p, T* to, int t, const float (&from)[kEight]) {
  const int time = static_cast<int>(p.time);
  const bool whole = p.vector_bytes == 16 && t + kEight <= time;
#pragma unroll
  for (int v = 0; v < kEight; v += kVector<T>) {
    uint32_t out[4];
    pack<T>(out, from + v);
    if (whole)
      store_vector(to + v, out);
    else if (t + v < time)
      store_pieces(to + v, out, rest_of<T>(p, t + v), p.vector_bytes);
  }
}

// z at positions s .. s + 7 of a row: x * open, or 0 by selection where a position is `off`. Vector v of x lies at
// x[v * step], that of the gate at gate[v * step]; nullptr: not needed, or none. kStaged: in shared memory, with zeros
// outside of the row, where otherwise nothing is read.
template <class T, bool kStaged>
struct ChunkInputs {
  float x[kEight] = {}, open[kEight];
  unsigned off = 0;

  CK_DEVICE ChunkInputs(const Problem& p, int64_t b, int s, const T* x_at, const T* gate, int step) {
    const auto load = [&](const T* from, int count, float* to) {
      if constexpr (kStaged) {
        unpack_vector(to, from);
      } else {
        uint32_t words[4];
        load_pieces(words, from, count, p.vector_bytes);
        unpack<T>(to, words);
      }
    };
#pragma unroll
    for (int i = 0; i < kEight; ++i) open[i] = 1;
#pragma unroll
    for (int k0 = 0; k0 < kEight; k0 += kVector<T>) {
      if (s + k0 < 0 || s + k0 >= static_cast<int>(p.time)) {
        off |= ((1u << kVector<T>)-1u) << k0;
        continue;
      }
      const int v = k0 / kVector<T> * step;
      const int count = rest_of<T>(p, s + k0);
      if (x_at != nullptr) load(x_at + v, count, x + k0);
      if (gate != nullptr) {
        load(gate + v, count, open + k0);
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) open[k0 + k] = sigmoid<T>(open[k0 + k]);
      }
      if (p.mask == nullptr) continue;
      const bool* mask = p.mask + b * p.mask_batch + (s + k0) * p.mask_time;
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k, mask += p.mask_time) off |= unsigned{k < count && !*mask} << (k0 + k);
    }
  }

  CK_DEVICE bool is_off(int i) const { return (off >> i & 1u) != 0; }
  CK_DEVICE float z(int i) const { return is_off(i) ? 0.0f : x[i] * open[i]; }
};

// Outputs [first, last) of a lane are in one sequence, which has elements [from, to) of the lane's window.
struct ChunkPart {
  int first = 0, last = kEight;
  unsigned from = 0, to = 0;

  CK_DEVICE bool has(int i) const { return i >= first && i < last; }
};

// Calls body(part) until the 8 outputs at t are done: once, or, by the whole warp, as often as one of its lanes has
// sequences.
template <bool kPacked, class Body>
CK_DEVICE void for_parts(const Problem& p, const TimeTiles& g, int t, const Body& body) {
  ChunkPart part;
  if constexpr (kPacked) {
    const int64_t start = g.window_start(t);
    const auto element = [&](int64_t s) {
      return static_cast<unsigned>(min(max(s - start, int64_t{0}), int64_t{kEight * (g.chunks + 1)}));
    };
    for (part.last = 0; __any_sync(kAllLanes, part.last < kEight);) {
      part.first = part.last;
      const Sequence sequence = sequence_of(p, t + part.first);
      part.from = element(sequence.begin);
      part.to = element(sequence.end);
      // What follows the last sequence reads it.
      const int64_t outputs = sequence.end - t;
      part.last = outputs > part.first ? static_cast<int>(min(outputs, int64_t{kEight})) : kEight;
      body(part);
    }
  } else {
    body(part);
  }
}

// Two chunks of a lane's window in registers: what its outputs read at elements 8 n .. 8 n + 7.
template <class E, bool kPacked>
struct ChunkWindow {
  char* row;
  int lane_chunk, held = -1;
  ChunkPart part;
  float value[2 * kEight];

  CK_DEVICE ChunkWindow(char* row, int lane_chunk, const ChunkPart& part)
      : row(row), lane_chunk(lane_chunk), part(part) {}

  CK_DEVICE void move_to(int n) {
    if (held == n) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) value[k] = value[kEight + k];
    } else {
      read(n, value);
    }
    read(n + 1, value + kEight);
    held = n + 1;
  }

 private:
  CK_DEVICE void read(int n, float* to) {
    read_chunk<E>(row, lane_chunk + n, to);
    if constexpr (kPacked) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) {
        const unsigned element = static_cast<unsigned>(kEight * n + k);
        if (element < part.from || element >= part.to) to[k] = 0;
      }
    }
  }
};

// Calls use(u) for the elements 8 n + u that a tap reads, mostly all of them.
template <class Use>
CK_DEVICE void for_taps(unsigned mask, const Use& use) {
  if (mask == 0xffu) {
#pragma unroll
    for (int u = 0; u < kEight; ++u) use(u);
  } else {
#pragma unroll
    for (int u = 0; u < kEight; ++u)
      if ((mask >> u & 1u) != 0) use(u);
  }
}

// sum[i] = sum over taps of the filter times what output i reads, for the outputs of the window's part.
template <class Window>
CK_DEVICE void correlate(float (&sum)[kEight], Window window, const TimeTiles& g, const uint8_t* masks,
                         const float* filter) {
  float total[kEight] = {};
#pragma unroll 1
  for (int n = 0; n < g.chunks; ++n) {
    const unsigned mask = masks[n];
    if (mask == 0) continue;
    window.move_to(n);
    const float4 low = reinterpret_cast<const float4*>(filter)[2 * n];
    const float4 high = reinterpret_cast<const float4*>(filter)[2 * n + 1];
    const float w[kEight] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for_taps(mask, [&](int u) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) total[i] += w[u] * window.value[u + i];
    });
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum[i] = window.part.has(i) ? total[i] : sum[i];
}

// sums[e] += sum over outputs i of z[i] times what output i reads at element 8 first + e.
template <int kChunks, class Window>
CK_DEVICE void collect(float (&sums)[kChunks * kEight], Window window, const TimeTiles& g, const uint8_t* masks,
                       int first, const float (&z)[kEight]) {
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const int n = first + k;
    const unsigned mask = n < g.chunks ? masks[n] : 0u;
    if (mask == 0) continue;
    window.move_to(n);
    for_taps(mask, [&](int u) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) sums[k * kEight + u] += z[i] * window.value[u + i];
    });
  }
}

// Calls use(shift) with a number that the compiler knows, from 0 to 7: bit by bit.
template <int kBit = kEight / 2, int kKnown = 0, class Use>
CK_DEVICE void with_known_shift(int shift, const Use& use) {
  if constexpr (kBit == 0) {
    use(std::integral_constant<int, kKnown>{});
  } else {
    if ((shift & kBit) != 0)
      with_known_shift<kBit / 2, kKnown + kBit>(shift, use);
    else
      with_known_shift<kBit / 2, kKnown>(shift, use);
  }
}

// A lane's window where taps are few: all of it in registers.
template <class E>
struct FewTaps {
  float value[3 * kEight];

  CK_DEVICE FewTaps(char* row, int lane_chunk, const TimeTiles& g) {
    read_chunk<E>(row, lane_chunk, value);
    read_chunk<E>(row, lane_chunk + 1, value + kEight);
    if (g.chunks > 1) read_chunk<E>(row, lane_chunk + 2, value + 2 * kEight);
  }

  // Calls use(j, element, window) for each tap j, which reads window[i] for output i, an element of the first one's.
  template <class Use>
  CK_DEVICE void for_each(const TimeTiles& g, const Use& use) const {
    const int taps = static_cast<int>(g.taps.taps);
    with_known_shift(g.shift, [&](auto shift) {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (j > 0 && j >= taps) break;
        use(j, decltype(shift)::value + j, value + decltype(shift)::value + j);
      }
    });
  }
};

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
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      if (j < static_cast<int>(g.taps.taps)) filter[j] = self.filter[g.shift + j];
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
