// The last step of d(weight) and d(bias) in every family: partial sums are added in a fixed order.
#pragma once

#include "csrc/cuda/conv/filters.cuh"

namespace ck::cuda {

constexpr int kReduceThreads = 256, kReduceWarps = kReduceThreads / 32;
constexpr int kReduceWeightThreads = 768;  // more would have to keep registers in memory

// grad_weight[owner, h] from partial_weight [owner, groups, heads * pieces, K], by `lanes` threads of a block each, a
// power of two, or a whole block; then through dropout and softmax, unless the pieces have been (`finished`). Shared
// memory: K numbers per head of the block. Neighbours read what lies side by side, and the index of a number is not
// divided.
template <class C>
CK_GLOBAL(kReduceWeightThreads, 1)
void reduce_weight(const CK_PARAM Backward p, int lanes, int64_t pieces, bool finished) {
  CK_SHARED(C, sums, kReduceWeightThreads);
  const int own = threadIdx.x % lanes, place = threadIdx.x / lanes;
  const int64_t K = p.taps.taps;
  const unsigned head = blockIdx.x * (blockDim.x / lanes) + place, heads = static_cast<unsigned>(p.heads);
  const int64_t h = head % heads, owner = head / heads;
  const bool exists = owner < p.owners();
  C* const d = reinterpret_cast<C*>(shared_memory()) + place * K;
  const FilterAt f(p, owner, 0, h);
  // A thread has tap j0 + tap of every so many pieces and groups, from its own on.
  const int width = static_cast<int>(min(K, int64_t{lanes})), max_rows = lanes / width;
  const int tap = own % width, row = own / width, count = static_cast<int>(pieces);
  const int turns = static_cast<int>(ceil_div(count, max_rows)), piece_step = static_cast<int>(ceil_div(count, turns));
  const int group_step = max_rows / piece_step, rows = group_step * piece_step;
  const int64_t group_size = p.heads * pieces * K;
  for (int64_t j0 = 0; j0 < K; j0 += width) {
    C total = 0;
    if (exists && row < rows && j0 + tap < K)
      for (int piece = row % piece_step; piece < count; piece += piece_step) {
        const C* from = static_cast<const C*>(p.partial_weight) + owner * p.groups * group_size +
                        row / piece_step * group_size + (h * pieces + piece) * K + j0 + tap;
#pragma unroll 8
        for (int group = row / piece_step; group < p.groups; group += group_step, from += group_step * group_size)
          total += *from;
      }
    sums[threadIdx.x] = total;
    __syncthreads();
    for (int left = rows; left > 1;) {
      const int half = (left + 1) / 2;
      if (row < left - half) sums[threadIdx.x] += sums[threadIdx.x + half * width];
      __syncthreads();
      left = half;
    }
    if (exists && row == 0 && j0 + tap < K)
      d[j0 + tap] = finished ? sums[threadIdx.x] : sums[threadIdx.x] * dropout_factor<C>(p, f, j0 + tap);
    __syncthreads();
  }
  // The rest is a warp's per head, or a part of one.
  const int team = min(lanes, 32);
  if (own >= team) return;
  // Here filters are the same at all positions: any one sees all taps.
  const Sequence anywhere{0, 0, 0, kUnbounded};
  const int64_t taps = exists ? K : 0;
  Statistics<C> statistics;
  C inner = 0;
  if (!finished && p.softmax) {
    statistics = warp_statistics<C>(p, f, 0, own, anywhere, team, exists);
    for (int64_t j = own; j < taps; j += team) inner += tap_of(p, f, 0, j, statistics, anywhere).p * d[j];
    inner = lane_sum(inner, team);
  }
  for (int64_t j = own; j < taps; j += team) {
    C value = d[j];
    if (!finished && p.softmax) value = tap_of(p, f, 0, j, statistics, anywhere).p * (value - inner);
    store_as(p.grad_weight, (owner * p.heads + h) * K + j, p.weight_dtype, value);
  }
}

// grad_weight of filters per position from partial_weight [pieces, filters, K], a thread per number.
CK_GLOBAL(kReduceThreads, 2)
void reduce_pieces(const CK_PARAM Backward p, int64_t pieces) {
  const int64_t count = p.filters() * p.taps.taps, i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (i >= count) return;
  const float* const from = static_cast<const float*>(p.partial_weight) + i;
  float total = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) total += from[piece * count];
  store_as(p.grad_weight, i, p.weight_dtype, total);
}

// grad_bias from partial_bias [rows, channels]; a block per 32 channels.
template <class C>
CK_GLOBAL(kReduceThreads, 2)
void reduce_bias(const CK_PARAM Backward p, int64_t rows) {
  CK_SHARED(C, sums, kReduceWarps * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  C total = 0;
  if (c < p.channels)
    for (int64_t row = warp; row < rows; row += kReduceWarps)
      total += static_cast<const C*>(p.partial_bias)[row * p.channels + c];
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || c >= p.channels) return;
  C all = 0;
  for (int w = 0; w < kReduceWarps; ++w) all += sums[w * 32 + lane];
  store_as(p.grad_bias, c, p.bias_dtype, all);
}

}  // namespace ck::cuda
