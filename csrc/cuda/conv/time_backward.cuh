// The backward pass of the time family: d(x), d(gate), d(filters) and d(bias) from one walk over x and d(y).
#pragma once

#include "csrc/cuda/conv/time.cuh"

namespace ck::cuda {

// A warp has kChunks chunks of the window, whose sums for d(filters) its lanes have in registers; the warp with the
// first ones also makes everything else. Inputs see d(y) through the transposed relation, g.taps.
template <class T, bool kPacked, int kChunks, bool kBulk>
CK_GLOBAL(32 * kTimeWarps, kChunks > 2 && sizeof(T) == 4 ? 2 : 3)
void time_backward(const CK_PARAM Backward p, const CK_PARAM TimeTiles g, int64_t windows) {
  const TimeLane self(g);
  const TimeWork work(p, g, p.groups, windows);
  if (!work.exists) return;
  const int lane = threadIdx.x % 32;
  const int64_t c = work.c0 + self.row;
  const int time = static_cast<int>(p.time);
  const bool exists = c < p.channels;
  const int end = exists ? time : 0;  // of what is stored
  const bool need_weight = p.grad_weight != nullptr, need_gate = p.grad_gate.data != nullptr;
  const bool need_input = work.window == 0 && (p.grad_x.data != nullptr || need_gate);
  const bool need_x = need_weight || need_gate, gated = p.gate.data != nullptr;
  const bool need_bias = work.window == 0 && p.grad_bias != nullptr;
  if (need_input) self.fill(p, g, true, work);
  float sums[kChunks * kEight] = {}, bias = 0;
  TimePlace place = work.start;
  // Where position 0 of the row is in the tensors that are stored.
  T *dx_line = at<T>(p.grad_x, place.b, 0, c), *dgate_line = at<T>(p.grad_gate, place.b, 0, c);
  // Of a window of few taps.
  float filter[kEight] = {};
  const bool few = !kPacked && g.few_taps();
  if (few && need_input) {
    __syncwarp();
    self.load_few(filter, g);
  }
  using Copies = TimeCopies<kBulk, T, 3>;
  Copies copies(p, g, self, work,
                {{{p.grad, at<const T>(p.grad, place.b, 0, c)},
                  {p.x, at<const T>(p.x, place.b, 0, c), need_x},
                  {p.gate, at<const T>(p.gate, place.b, 0, c), gated}}});
  for_tiles(copies, work.count, place, [&](char* row) {
    const int64_t b = place.b;
    const int t = place.t + kEight * self.part;
    T *const to_x = dx_line + t, *const to_gate = dgate_line + t;
    const bool continues = place.advance(g, time);
    if (!continues) {
      dx_line += p.grad_x.batch;
      dgate_line += p.grad_gate.batch;
    }
    const auto own_gate = [&] { return self.own(row) + Copies::kStretch * 32 * kChunkBytes<T>; };
    const auto inputs_of = [&] {
      return ChunkInputs<T, true>(p, b, t, need_x ? self.own(row) : nullptr, gated ? own_gate() : nullptr,
                                  p.gate_activation);
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
    if (need_input) {
      const ChunkInputs<T, true> inputs = inputs_of();
      float out[kEight];
      if (p.grad_x.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) out[i] = inputs.is_off(i) ? 0.0f : dz[i] * inputs.open[i];
        store_chunk<T>(p, g, to_x, t, end, out);
      }
      if (need_gate) {
        with_activation(p.gate_activation, [&](Activation act) {
          // The sigmoid says its own slope; for others the gate is read again.
          float gate[kEight] = {};
          if (act != Activation::kSigmoid) read_chunk<T>(own_gate(), 0, gate);
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            const float open = act == Activation::kSigmoid ? inputs.open[i] : sigmoid<T>(gate[i]);
            out[i] = inputs.is_off(i) ? 0.0f : times_slope(dz[i] * inputs.x[i], gate[i], open, act);
          }
        });
        store_chunk<T>(p, g, to_gate, t, end, out);
      }
    }
    if (need_bias) {
      // d(y) at the lane's own positions: a whole chunk, because rows begin at multiples of 8 positions.
      float own[kEight];
      read_chunk<T>(row, self.part + static_cast<int>(g.taps.left + g.shift) / kEight, own);
#pragma unroll
      for (int i = 0; i < kEight; ++i) bias += own[i];
    }
    return continues;
  });
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
#pragma unroll 1
  for (int e = lane; e < kChunks * kEight; e += 32) {
    const int64_t K = p.taps.taps, j = g.tap_at(work.window * kChunks * kEight + e);
    if (j < 0) continue;
#pragma unroll 1
    for (int r = 0; r < g.rows() && work.c0 + r < p.channels; ++r) {
      float total = 0;
#pragma unroll 1
      for (int k = 0; k < g.lanes; ++k) total += columns[(r * g.lanes + k) * kPitch + e];
      static_cast<float*>(p.partial_weight)[(work.piece * p.channels + work.c0 + r) * K + K - 1 - j] = total;
    }
  }
}

}  // namespace ck::cuda
