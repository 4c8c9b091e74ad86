// The backward pass of the time family: d(x), d(gate), d(filters) and d(bias) from one walk over x and d(y).
#pragma once

#include "csrc/cuda/conv/time.cuh"

namespace ck::cuda {

// A warp has kChunks chunks of the window, whose sums for d(filters) its lanes have in registers; the warp with the
// first ones also makes everything else. Inputs see d(y) through the transposed relation, g.taps.
template <class T, bool kPacked, int kChunks>
CK_GLOBAL(32 * kTimeWarps, 4 - (kPacked ? 1 : 0) - (kChunks > 2 && sizeof(T) == 4 ? 1 : 0))
void time_backward(const CK_PARAM Backward p, const CK_PARAM TimeTiles g, int64_t windows) {
  const TimeLane self(g);
  const TimeWork work(p, g, p.groups, windows);
  if (!work.exists) return;
  const int lane = threadIdx.x % 32;
  const int64_t c = work.c0 + self.row;
  const bool exists = c < p.channels;
  const bool need_weight = p.grad_weight != nullptr, need_gate = p.grad_gate.data != nullptr;
  const bool need_input = work.window == 0 && (p.grad_x.data != nullptr || need_gate);
  const bool need_x = need_weight || need_gate, gated = p.gate.data != nullptr;
  const bool need_bias = work.window == 0 && p.grad_bias != nullptr;
  if (need_input) self.fill(p, g, true, work);
  float sums[kChunks * kEight] = {}, bias = 0;
  // Vector v of the lane's chunk of x, and from v = kEight / kVector<T> on of the gate, is 32 v vectors further.
  constexpr int kStep = 32 * kVector<T>, kCount = kEight / kVector<T>;
  const auto own_of = [&](int tile) {
    char* const end = self.tile(g, tile) - self.row * g.row_bytes + self.stage_bytes - g.own_bytes;
    return reinterpret_cast<T*>(end) + lane * kVector<T>;
  };
  TimePlace place = work.start, next = place;
  const auto stage = [&](int tile) {
    if (tile < work.count) {
      stage_row<T>(p, g, self, p.grad, next, c, self.tile(g, tile));
      const int64_t t = next.t + kEight * self.part;
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const int64_t s = t + v * kVector<T>;
        const auto copy = [&](int n, const Rows& rows) {
          const bool inside = exists && s < p.time;
          stage_pieces(own_of(tile) + n * kStep,
                       inside ? at<const T>(rows, next.b, s, c) : static_cast<const T*>(rows.data),
                       inside ? rest_of<T>(p, s) : 0, p.vector_bytes);
        };
        if (need_x) copy(v, p.x);
        if (gated) copy(kCount + v, p.gate);
      }
      next.advance(g, p.time);
    }
    cp_async_commit();
  };
  for (int tile = 1 - kTimeStages; tile < work.count; ++tile) {
    stage(tile + kTimeStages - 1);
    if (tile < 0) continue;
    char* const row = self.tile(g, tile);
    const int64_t b = place.b, t = place.t + kEight * self.part;
    place.advance(g, p.time);
    cp_async_wait<kTimeStages - 1>();
    __syncwarp();
    const auto inputs_of = [&] {
      const T* const own = own_of(tile);
      return ChunkInputs<T, true>(p, b, t, need_x ? own : nullptr, gated ? own + kCount * kStep : nullptr, kStep);
    };
    float dz[kEight];
    for_parts<kPacked>(p, g, t, [&](const ChunkPart& part) {
      const ChunkWindow<T, kPacked> dy(row, self.part, part);
      if (need_weight) {
        const ChunkInputs<T, true> inputs = inputs_of();
        float z[kEight];
#pragma unroll
        for (int i = 0; i < kEight; ++i) z[i] = part.has(i) ? inputs.z(i) : 0.0f;
        collect<kChunks>(sums, dy, g, self.masks, work.window * kChunks, z);
      }
      if (need_input) correlate(dz, dy, g, self.masks, self.filter);
    });
    if (need_input && exists) {
      const ChunkInputs<T, true> inputs = inputs_of();
      float out[kEight];
      if (p.grad_x.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) out[i] = inputs.is_off(i) ? 0.0f : dz[i] * inputs.open[i];
        store_chunk<T>(p, p.grad_x, b, t, c, out);
      }
      if (need_gate) {
#pragma unroll
        for (int i = 0; i < kEight; ++i)
          out[i] = inputs.is_off(i) ? 0.0f : dz[i] * inputs.x[i] * inputs.open[i] * (1 - inputs.open[i]);
        store_chunk<T>(p, p.grad_gate, b, t, c, out);
      }
    }
    if (need_bias) {
      // d(y) at the lane's own positions: a whole chunk, because rows begin at multiples of 8 positions.
      float own[kEight];
      read_chunk<T>(row, self.part + static_cast<int>(g.taps.left + g.shift) / kEight, own);
#pragma unroll
      for (int i = 0; i < kEight; ++i) bias += own[i];
    }
    __syncwarp();
  }
  if (need_bias) {
    bias = lane_sum(bias, g.lanes);
    if (self.part == 0 && exists) static_cast<float*>(p.partial_bias)[work.piece * p.channels + c] = bias;
  }
  if (!need_weight) return;
  // The tiles have been read: their memory is free.
  constexpr int kPitch = kTimeSumPitch<kChunks>;
  float* const columns = reinterpret_cast<float*>(self.tiles);
#pragma unroll
  for (int e = 0; e < kChunks * kEight; ++e) columns[lane * kPitch + e] = sums[e];
  __syncwarp();
  for (int e = lane; e < kChunks * kEight; e += 32) {
    const int64_t K = p.taps.taps, j = g.tap_at(work.window * kChunks * kEight + e);
    if (j < 0) continue;
    for (int r = 0; r < g.rows() && work.c0 + r < p.channels; ++r) {
      float total = 0;
      for (int k = 0; k < g.lanes; ++k) total += columns[(r * g.lanes + k) * kPitch + e];
      static_cast<float*>(p.partial_weight)[(work.piece * p.channels + work.c0 + r) * K + K - 1 - j] = total;
    }
  }
}

}  // namespace ck::cuda
