// The backward pass of the time family: d(x), d(gate), d(filters) and d(bias) from one walk over x and d(y).
#pragma once

#include "csrc/cuda/conv/time.cuh"

namespace ck::cuda {

// A warp has kChunks chunks of the window, whose sums for d(filters) its lanes have in registers; the warp with the
// first ones also makes everything else. Inputs see d(y) through the transposed relation, g.taps.
template <class T, bool kPacked, int kChunks>
CK_GLOBAL(32 * kTimeWarps, kChunks > 2 && sizeof(T) == 4 ? 2 : 3)
void time_backward(const CK_PARAM Backward p, const CK_PARAM TimeTiles g, int64_t windows) {
  const TimeLane self(g);
  const TimeWork work(p, g, p.groups, windows);
  if (!work.exists) return;
  const int lane = threadIdx.x % 32;
  const int64_t c = work.c0 + self.row;
  const int time = static_cast<int>(p.time);
  const bool exists = c < p.channels;
  const bool need_weight = p.grad_weight != nullptr, need_gate = p.grad_gate.data != nullptr;
  const bool need_input = work.window == 0 && (p.grad_x.data != nullptr || need_gate);
  const bool need_x = need_weight || need_gate, gated = p.gate.data != nullptr;
  const bool need_bias = work.window == 0 && p.grad_bias != nullptr;
  if (need_input) self.fill(p, g, true, work);
  float sums[kChunks * kEight] = {}, bias = 0;
  // Vector v of the lane's chunk of x, and from v = kEight / kVector<T> on of the gate, is 32 v vectors further.
  constexpr int kStep = 32 * kVector<T>, kCount = kEight / kVector<T>;
  const int own_offset = self.stage_bytes - g.own_bytes - self.row * g.row_bytes + lane * kVectorBytes;
  const auto own_of = [&](char* row) { return reinterpret_cast<T*>(row + own_offset); };
  TimePlace place = work.start, next = place;
  // Where position 0 of the row is in the tensors that are copied next, and in those that are stored.
  const T *dy_line = at<const T>(p.grad, next.b, 0, c), *x_line = at<const T>(p.x, next.b, 0, c),
          *gate_line = at<const T>(p.gate, next.b, 0, c);
  T *dx_line = at<T>(p.grad_x, place.b, 0, c), *dgate_line = at<T>(p.grad_gate, place.b, 0, c);
  bool next_continues = false, continues = false;
  const auto stage = [&](int tile, char* row) {
    if (tile < work.count) {
      stage_row<T>(p, g, self, dy_line, static_cast<const T*>(p.grad.data), next.t, exists, next_continues, row);
      const int t = next.t + kEight * self.part;
      T* const own = own_of(row);
      const bool whole = exists && p.vector_bytes == 16 && t + kEight <= time;
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const int s = t + v * kVector<T>;
        const auto copy = [&](int n, const T* line, const Rows& rows) {
          if (whole) return cp_async<16>(own + n * kStep, line + s, true);
          const bool inside = exists && s < time;
          stage_pieces(own + n * kStep, inside ? line + s : static_cast<const T*>(rows.data),
                       inside ? rest_of<T>(p, s) : 0, p.vector_bytes);
        };
        if (need_x) copy(v, x_line, p.x);
        if (gated) copy(kCount + v, gate_line, p.gate);
      }
      next_continues = next.advance(g, time);
      if (!next_continues) {
        dy_line += p.grad.batch;
        x_line += p.x.batch;
        gate_line += p.gate.batch;
      }
    }
    cp_async_commit();
  };
  // Of a window of few taps.
  float filter[kEight] = {};
  const bool few = !kPacked && g.few_taps();
  if (few && need_input) {
    __syncwarp();
    self.load_few(filter, g);
  }
  TimeTurns turns(g, self);
  stage(0, turns.now);
  stage(1, turns.next);
  for (int tile = 0; tile < work.count; ++tile) {
    char* const row = turns.now;
    const int64_t b = place.b;
    const int t = place.t + kEight * self.part;
    cp_async_wait<kTimeStages - 2>();
    __syncwarp();
    if (continues) self.template move_on<T>(g, turns.last, row);
    T *const to_x = dx_line + t, *const to_gate = dgate_line + t;
    continues = place.advance(g, time);
    if (!continues) {
      dx_line += p.grad_x.batch;
      dgate_line += p.grad_gate.batch;
    }
    __syncwarp();
    stage(tile + 2, turns.last);
    turns.advance();
    const auto inputs_of = [&] {
      const T* const own = own_of(row);
      return ChunkInputs<T, true>(p, b, t, need_x ? own : nullptr, gated ? own + kCount * kStep : nullptr, kStep);
    };
    float dz[kEight] = {};
    if (few) {
      const FewTaps<T> dy(row, self.part, g);
      float z[kEight] = {};
      if (need_weight) {
        const ChunkInputs<T, true> inputs = inputs_of();
#pragma unroll
        for (int i = 0; i < kEight; ++i) z[i] = inputs.z(i);
      }
      // Sums that nobody wants cost less than code that leaves them out.
      dy.for_each(g, [&](int j, int element, const float* window) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          dz[i] += filter[j] * window[i];
          sums[element] += z[i] * window[i];
        }
      });
    } else {
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
    }
    if (need_input && exists) {
      const ChunkInputs<T, true> inputs = inputs_of();
      float out[kEight];
      if (p.grad_x.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) out[i] = inputs.is_off(i) ? 0.0f : dz[i] * inputs.open[i];
        store_chunk<T>(p, to_x, t, out);
      }
      if (need_gate) {
#pragma unroll
        for (int i = 0; i < kEight; ++i)
          out[i] = inputs.is_off(i) ? 0.0f : dz[i] * inputs.x[i] * inputs.open[i] * (1 - inputs.open[i]);
        store_chunk<T>(p, to_gate, t, out);
      }
    }
    if (need_bias) {
      // d(y) at the lane's own positions: a whole chunk, because rows begin at multiples of 8 positions.
      float own[kEight];
      read_chunk<T>(row, self.part + static_cast<int>(g.taps.left + g.shift) / kEight, own);
#pragma unroll
      for (int i = 0; i < kEight; ++i) bias += own[i];
    }
  }
  if (need_bias) {
    bias = lane_sum(bias, g.lanes);
    if (self.part == 0 && exists) static_cast<float*>(p.partial_bias)[work.piece * p.channels + c] = bias;
  }
  if (!need_weight) return;
  // The tiles have been read: their memory is free.
  __syncwarp();
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
