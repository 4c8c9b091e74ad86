// Filters that all positions share, positions side by side in memory: a warp walks tiles of a few channel rows, staged
// in shared memory with what their windows reach, and each lane slides a window over 8 consecutive positions.
#pragma once

#include <type_traits>

#include "csrc/common/switch.h"
#include "csrc/cuda/conv/finish.cuh"
#include "csrc/cuda/conv/time_copies.cuh"

namespace ck::cuda {

// Tiles that are not copied: x is gated and masked on its way, once, into float32.
template <class T, bool kFinish>
class TimeGated {
 public:
  CK_DEVICE TimeGated(const Forward& p, const TimeTiles& g, const TimeLane& self, const TimeWork& work,
                      const TimeSources<T, 1>&)
      : p_(p), g_(g), self_(self), c_(work.c0 + self.row), place_(work.start) {}

  static constexpr int kStretch = 1;

  // The lane's row of the next tile.
  CK_DEVICE char* next(int, bool) {
    char* const row = self_.tile(g_, 0);
    // A channel that does not exist reads channel 0; its result is not stored.
    const int64_t from = c_ < p_.channels ? c_ : 0;
    const int start = g_.window_start(place_.t);
    __syncwarp();  // the tile before has been read
#pragma unroll 1
    for (int n = self_.part; n < g_.lanes + g_.chunks; n += g_.lanes) {
      const int s = start + n * kEight;
      const ChunkInputs<T, false> inputs(p_, place_.b, s, at<const T>(p_.x, place_.b, s, from),
                                         p_.gate.data == nullptr ? nullptr : at<const T>(p_.gate, place_.b, s, from),
                                         p_.template gates<kFinish>());
#pragma unroll
      for (int v = 0; v < kEight; v += kVector<float>) {
        Words<float> z;
#pragma unroll
        for (int k = 0; k < kVector<float>; ++k) z.at[k] = inputs.z(v + k);
        *vector_at<float>(row, n, v / kVector<float>) = z;
      }
    }
    place_.advance(g_, static_cast<int>(p_.time));
    __syncwarp();
    return row;
  }

 private:
  const Forward& p_;
  const TimeTiles& g_;
  const TimeLane& self_;
  int64_t c_;
  TimePlace place_;
};

// kReady: rows are gated and masked on their way; otherwise they are copied as they are, kBulk: by bulk copies.
template <class T, bool kReady, bool kPacked, bool kBulk, bool kFinish>
CK_DEVICE void time_outputs(const Forward& p, const TimeTiles& g, int64_t groups) {
  using E = std::conditional_t<kReady, float, T>;
  const TimeLane self(g);
  const TimeWork work(p, g, groups, 1);
  if (work.count == 0) return;
  const int64_t c = work.c0 + self.row;
  const int time = static_cast<int>(p.time);
  const bool exists = c < p.channels;
  const int end = exists ? time : 0;  // of what is stored
  self.fill(p, g, false, work);
  const float bias = p.bias != nullptr && exists ? load_as<float>(p.bias, c, p.bias_dtype) : 0.0f;
  TimePlace place = work.start;
  T* to = at<T>(p.y, place.b, 0, c);
  // Of a window of few taps.
  float filter[kEight] = {};
  const bool few = !kPacked && g.few_taps();
  if (few) {
    __syncwarp();
    self.load_few(filter, g);
  }
  using Copies = std::conditional_t<kReady, TimeGated<T, kFinish>, TimeCopies<kBulk, T, 1>>;
  Copies copies(p, g, self, work, {{{p.x, at<const T>(p.x, place.b, 0, c)}}});
  for_tiles(copies, work.count, place, [&](char* row) {
    const int t = place.t + kEight * self.part;
    T* const here = to + t;
    const int64_t b = place.b;
    const bool continues = place.advance(g, time);
    if (!continues) to += p.y.batch;
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
    if constexpr (kFinish) {
      constexpr int kVectors = kEight / kVector<T>;
      FinishAt<T>(p.finish, b, t, c)
          .template finish<4, kVectors>([&](int v) { return sum + v * kVector<T>; },
                                        [&](int v) { return exists ? rest_of<T>(p, t + v * kVector<T>) : 0; },
                                        [](const Rows&) { return kVector<T>; }, p.vector_bytes);
    }
    store_chunk<T>(p, g, here, t, end, sum);
    return continues;
  });
}

template <class T, bool kReady, bool kPacked, bool kBulk>
CK_GLOBAL(32 * kTimeWarps, kPacked ? 4 : 5)
void time_forward(const CK_PARAM Forward p, const CK_PARAM TimeTiles g, int64_t groups) {
  time_outputs<T, kReady, kPacked, kBulk, false>(p, g, groups);
}

template <class T, bool kReady, bool kPacked, bool kBulk>
CK_GLOBAL(32 * kTimeWarps, 4)
void time_forward_finished(const CK_PARAM Forward p, const CK_PARAM TimeTiles g, int64_t groups) {
  time_outputs<T, kReady, kPacked, kBulk, true>(p, g, groups);
}

}  // namespace ck::cuda
