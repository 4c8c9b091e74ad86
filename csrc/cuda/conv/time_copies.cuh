// What a warp of the time kernels does, and how its tiles come to shared memory: each lane copies its own share by
// cp.async, or, from compute capability 9.0 on, one for all the others several tiles of a row at once, by bulk copies.
#pragma once

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
  int stage_bytes, own_offset;
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
    own_offset = opaque(stage_bytes - g.own_bytes - row * g.row_bytes + lane * g.chunk_bytes);
    masks = reinterpret_cast<uint8_t*>(shared);
    filters = reinterpret_cast<float*>(shared + g.mask_bytes() + warp * g.warp_bytes);
    filter = filters + row * g.filter_pitch;
    tiles = reinterpret_cast<char*>(filters) + g.filter_bytes();
#pragma unroll 1
    for (int n = threadIdx.x; n < g.chunks; n += blockDim.x) {
      unsigned mask = 0;
#pragma unroll 1
      for (int u = 0; u < kEight; ++u) mask |= unsigned{g.tap_at(kEight * n + u) >= 0} << u;
      masks[n] = static_cast<uint8_t>(mask);
    }
    __syncthreads();
  }

  // The lane's row of the tile in a slot.
  CK_DEVICE char* tile(const TimeTiles& g, int slot) const { return tiles + slot * stage_bytes + row * g.row_bytes; }

  // Its own chunk of another tensor; those of the lanes lie side by side.
  CK_DEVICE char* own(char* tile) const { return tile + own_offset; }

  // The filter of the lane's row where taps are few.
  CK_DEVICE void load_few(float (&values)[kEight], const TimeTiles& g) const {
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      if (j < static_cast<int>(g.taps.taps)) values[j] = filter[g.shift + j];
  }

  // The filters of the warp's channels, by the warp; value j lies where the window has what tap j reads.
  CK_DEVICE void fill(const Problem& p, const TimeTiles& g, bool transposed, const TimeWork& work) const {
    const int64_t K = p.taps.taps;
#pragma unroll 1
    for (int r = 0; r < g.rows() && work.c0 + r < p.channels; ++r)
      for_shared_taps<float>(p, FilterAt(p, work.owner, 0, (work.c0 + r) / p.head_channels()),
                             [&](int64_t j, float value) {
                               filters[r * g.filter_pitch + g.element_of(transposed ? K - 1 - j : j)] = value;
                             });
  }
};

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
    for (int n = 0; n < kEight / kVector<T>; ++n, e += step) cp_async<16>(element_at<T>(row, e), line + e, true);
    return;
  }
  const int begin = max(-start, 0);
  const int end = exists ? min(time - start, elements) : 0;
#pragma unroll 1
  for (e = opaque(e); e < elements; e += step) {
    const bool inside = e >= begin && e < end;
    stage_pieces(element_at<T>(row, e), inside ? line + e : anywhere, inside ? end - e : 0, p.vector_bytes);
  }
}

// A tensor that is copied: where position 0 of the row is that is copied next.
template <class T>
struct TimeSource {
  const Rows& rows;
  const T* line;
  bool wanted = true;
};
template <class T, int kTensors>
struct TimeSources {
  TimeSource<T> at[kTensors];

  CK_DEVICE void advance() {
#pragma unroll
    for (int k = 0; k < kTensors; ++k) at[k].line += at[k].rows.batch;
  }
};

// How tiles come: of the first tensor with what their windows reach, of the others the lanes' own positions.
//
// Here lanes copy for themselves, and tiles take turns: one is computed, the others are on their way.
template <class T, int kTensors>
class TimePieces {
 public:
  static constexpr int kStretch = 1;  // tiles that come as one

  CK_DEVICE TimePieces(const Problem& p, const TimeTiles& g, const TimeLane& self, const TimeWork& work,
                       const TimeSources<T, kTensors>& from)
      : p_(p),
        g_(g),
        self_(self),
        from_(from),
        count_(work.count),
        exists_(work.c0 + self.row < p.channels),
        place_(work.start),
        now_(self.tile(g, 0)),
        next_(self.tile(g, 1)),
        last_(self.tile(g, 2)) {
    copy(0, now_);
    copy(1, next_);
  }

  // The lane's row of the next tiles, which have come, from the one numbered `tile` on. `continues`: of the same row as
  // the tile before.
  CK_DEVICE char* next(int tile, bool continues) {
    cp_async_wait<kTimeStages - 2>();
    __syncwarp();
    if (continues) move_on(last_, now_);
    __syncwarp();
    copy(tile + 2, last_);
    char* const free = last_;
    last_ = now_;
    now_ = next_;
    next_ = free;
    return last_;
  }

 private:
  static_assert(kTimeStages == 3);

  // Starts the copies of a tile, if there is one.
  CK_DEVICE void copy(int tile, char* row) {
    if (tile < count_) {
      stage_row<T>(p_, g_, self_, from_.at[0].line, static_cast<const T*>(from_.at[0].rows.data), place_.t, exists_,
                   continues_, row);
      copy_own(self_.own(row) - self_.part * kChunkBytes<T>);
      continues_ = place_.advance(g_, static_cast<int>(p_.time));
      if (!continues_) from_.advance();
    }
    cp_async_commit();
  }

  // Of the lanes' own positions in a row: a lane copies its share of the row, which are not all its own.
  CK_DEVICE void copy_own(char* chunks) const {
    const int rest = exists_ ? static_cast<int>(p_.time) - place_.t : 0;
#pragma unroll
    for (int v = 0; v < kChunkVectors<T>; ++v) {
      const int e = (v * g_.lanes + self_.part) * kVector<T>, s = place_.t + e;
#pragma unroll
      for (int k = 1; k < kTensors; ++k) {
        const TimeSource<T>& from = from_.at[k];
        if (!from.wanted) continue;
        T* const to = element_at<T>(chunks + (k - 1) * 32 * kChunkBytes<T>, e);
        if (p_.vector_bytes == 16 && e < rest) {
          cp_async<16>(to, from.line + s, true);
          continue;
        }
        const bool inside = e < rest;
        stage_pieces(to, inside ? from.line + s : static_cast<const T*>(from.rows.data), inside ? rest - e : 0,
                     p_.vector_bytes);
      }
    }
  }

  // The first chunks of a tile are the last ones of the tile before, if both are of one row.
  CK_DEVICE void move_on(char* from, char* to) const {
#pragma unroll 1
    for (int i = self_.part; i < g_.chunks; i += g_.lanes)
#pragma unroll
      for (int v = 0; v < kChunkVectors<T>; ++v) *vector_at<T>(to, i, v) = *vector_at<T>(from, g_.lanes + i, v);
  }

  const Problem& p_;
  const TimeTiles& g_;
  const TimeLane& self_;
  TimeSources<T, kTensors> from_;
  int count_;
  bool exists_, continues_ = false;
  TimePlace place_;  // of the tile that is copied next
  char *now_, *next_, *last_;
};

// Here they come by bulk copies, kTimeStretch at a time if a row has as many: tiles of 32 chunks, of 16-bit numbers.
template <class T, int kTensors>
class TimeBulk {
 public:
  static constexpr int kStretch = kTimeStretch, kTileBytes = 32 * kEight * sizeof(T);

  CK_DEVICE TimeBulk(const Problem& p, const TimeTiles& g, const TimeLane& self, const TimeWork& work,
                     const TimeSources<T, kTensors>& from)
      : g_(g), self_(self), from_(from), time_(static_cast<int>(p.time)), t_(work.start.t), rest_(work.count) {
    CK_SHARED(uint64_t, arrivals, kTimeWarps* kTimeStages);
    arrived_ = arrivals + threadIdx.x / 32 * kTimeStages;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int slot = 0; slot < kTimeStages; ++slot) mbarrier_init(arrived_ + slot, 1);
      fence_mbarrier_init();
    }
    copy(0);
    copy(1);
  }

  // The row of the first of the next tiles, which have come: count() of them, kTileBytes apart.
  CK_DEVICE char* next(int, bool) {
    // The slot before has been read.
    __syncwarp();
    copy(slot_ == 0 ? kTimeStages - 1 : slot_ - 1);
    mbarrier_wait(arrived_ + slot_, parity_);
    char* const row = self_.tile(g_, slot_);
    slot_ = slot_ == kTimeStages - 1 ? 0 : slot_ + 1;
    if (slot_ == 0) parity_ ^= 1u;
    return row;
  }

  // How many tiles have come, of those from position t of a row on.
  CK_DEVICE int count(int t) const {
    return min(static_cast<int>(static_cast<unsigned>(time_ - t + kTile - 1) / kTile), kStretch);
  }

 private:
  static constexpr int kTile = 32 * kEight;
  static_assert(sizeof(T) == 2);

  // Starts the copies of the next tiles to a slot, if there are any left.
  CK_DEVICE void copy(int slot) {
    if (rest_ <= 0) return;
    const int tiles = min(count(t_), rest_), elements = tiles * kTile + g_.chunks * kEight;
    const int start = g_.window_start(t_), begin = min(max(-start, 0), elements),
              end = min(max(time_ - start, begin), elements);
    char* const to = self_.tile(g_, slot);
    if (begin > 0 || end < elements) {
      clear(to, 0, begin);
      clear(to, end, elements);
      // These are bytes that another copy overwrites.
      fence_async_proxy();
    }
    if (threadIdx.x % 32 == 0) {
      uint64_t* const arrived = arrived_ + slot;
      const unsigned window = static_cast<unsigned>(end - begin) * sizeof(T),
                     own = static_cast<unsigned>(min(tiles * kTile, time_ - t_)) * sizeof(T);
      unsigned bytes = window;
#pragma unroll
      for (int k = 1; k < kTensors; ++k)
        if (from_.at[k].wanted) bytes += own;
      mbarrier_arrive_expect(arrived, bytes);
      if (window > 0) bulk_load(to + begin * sizeof(T), from_.at[0].line + start + begin, window, arrived);
#pragma unroll
      for (int k = 1; k < kTensors; ++k)
        if (from_.at[k].wanted)
          bulk_load(to + g_.row_bytes + (k - 1) * kTimeStretch * kTileBytes, from_.at[k].line + t_, own, arrived);
    }
    rest_ -= tiles;
    t_ += tiles * kTile;
    if (t_ < time_) return;
    t_ = 0;
    from_.advance();
  }

  // Elements that do not exist are 0.
  CK_DEVICE void clear(char* row, int first, int last) const {
    const uint32_t zeros[4] = {};
    for (int e = first + self_.part * kEight; e < last; e += kTile) store_vector(row + e * sizeof(T), zeros);
  }

  const TimeTiles& g_;
  const TimeLane& self_;
  TimeSources<T, kTensors> from_;
  uint64_t* arrived_;    // of each slot, how often its copies have come
  int time_, t_, rest_;  // the position that is copied next; tiles that are not copied yet
  int slot_ = 0;
  unsigned parity_ = 0;
};

// Calls compute(row) for each of a warp's tiles, which begins at `place`, with the lane's row of it. compute() moves
// the place on, and returns whether the tile that follows is of the same row.
template <class Copies, class Compute>
CK_DEVICE void for_tiles(Copies& copies, int tiles, const TimePlace& place, const Compute& compute) {
  bool continues = false;
  for (int tile = 0; tile < tiles;) {
    char* row = copies.next(tile, continues);
    if constexpr (Copies::kStretch == 1) {
      continues = compute(row);
      ++tile;
    } else {
      const int end = tile + min(copies.count(place.t), tiles - tile);
#pragma unroll 1
      for (; tile < end; ++tile, row += Copies::kTileBytes) compute(row);
    }
  }
}

// The one place that says how tiles come.
template <bool kBulk, class T, int kTensors>
using TimeCopies = std::conditional_t<kBulk, TimeBulk<T, kTensors>, TimePieces<T, kTensors>>;

}  // namespace ck::cuda
