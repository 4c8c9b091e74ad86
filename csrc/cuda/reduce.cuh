// The last step of d(weight) and d(bias): partial sums are added in a fixed order, whatever kernel made them.
#pragma once

#include "filters.cuh"

namespace ck::cuda {

constexpr int kReduceThreads = 256, kReduceWarps = kReduceThreads / 32;

// grad_weight[owner, h] from partial_weight [owner, groups, heads * pieces, K], a block each; then through dropout and
// softmax, unless the pieces have been (`finished`). Shared memory: K numbers.
template <class C>
CK_GLOBAL(kReduceThreads, 2)
void reduce_weight(const CK_PARAM Backward p, int64_t pieces, bool finished) {
  CK_SHARED(C, sums, kReduceWarps * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t K = p.taps.taps, h = blockIdx.x % p.heads, owner = blockIdx.x / p.heads, rows = p.groups * pieces;
  C* const d = reinterpret_cast<C*>(shared_memory());
  const FilterAt f(p, owner, 0, h);
  for (int64_t j0 = 0; j0 < K; j0 += 32) {
    const int64_t j = j0 + lane;
    C total = 0;
    if (j < K)
      for (int64_t row = warp; row < rows; row += kReduceWarps) {
        const int64_t group = owner * p.groups + row / pieces;
        total += static_cast<const C*>(p.partial_weight)[((group * p.heads + h) * pieces + row % pieces) * K + j];
      }
    sums[threadIdx.x] = total;
    __syncthreads();
    if (warp == 0 && j < K) {
      C all = 0;
      for (int w = 0; w < kReduceWarps; ++w) all += sums[w * 32 + lane];
      d[j] = finished ? all : all * dropout_factor<C>(p, f, j);
    }
    __syncthreads();
  }
  if (warp > 0) return;
  // Here filters are the same at all positions: any one sees all taps.
  const Sequence anywhere{0, 0, 0, kUnbounded};
  Statistics<C> statistics;
  C inner = 0;
  if (!finished && p.softmax) {
    statistics = warp_statistics<C>(p, f, 0, lane, anywhere);
    for (int64_t j = lane; j < K; j += 32) inner += tap_of(p, f, 0, j, statistics, anywhere).p * d[j];
    inner = lane_sum(inner);
  }
  for (int64_t j = lane; j < K; j += 32) {
    C value = d[j];
    if (!finished && p.softmax) value = tap_of(p, f, 0, j, statistics, anywhere).p * (value - inner);
    store_as(p.grad_weight, (owner * p.heads + h) * K + j, p.weight_dtype, value);
  }
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
