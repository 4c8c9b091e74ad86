// Gradients of attention's tables: partial sums over positions for the depthwise term, and the sums of partial sums, in
// a fixed order.
#pragma once

#include "csrc/cuda/attention/common.cuh"
#include "csrc/cuda/attention/plan.h"

namespace ck::cuda {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / 32;

// partial_taps [batch, heads, parts, window + 1, channels]: sums of grad * v for each tap, and of grad. Blocks: parts,
// heads, batch rows.
template <class T>
CK_GLOBAL(kSumThreads, 2)
void attention_taps(const CK_PARAM AttentionBackward p, int64_t tiles) {
  using C = Compute<T>;
  const int64_t part = blockIdx.x % p.tap_parts, unit = blockIdx.x / p.tap_parts;
  const int64_t b = unit / p.heads, h = unit % p.heads, g = h / p.sharing();
  const int64_t W = p.window(), count = (W + 1) * p.channels;
  C* const sums = static_cast<C*>(p.partial_taps) + blockIdx.x * count;
  // A thread has its elements to itself.
  for (int64_t e = threadIdx.x; e < count; e += kSumThreads) sums[e] = 0;
#pragma unroll 1
  for (int64_t t = part; t < tiles; t += p.tap_parts) {
    const AttentionTile tile(p, t, kTapRows, false);
    if (tile.count <= 0) continue;
#pragma unroll 1
    for (int64_t e = threadIdx.x; e < count; e += kSumThreads) {
      const int c = static_cast<int>(e / p.channels);
      const int64_t d = e % p.channels;
      C sum = 0;
#pragma unroll 1
      for (int i = tile.first; i < tile.first + tile.count; ++i) {
        const C grad = widen(at<T>(p.grad, b, i, h)[d * p.grad.channel]);
        if (c == W) {
          sum += grad;
          continue;
        }
        const Range taps = taps_of(p, tile, i);
        const int64_t j = int64_t{i} + tile.shift - p.left + c;
        if (c >= taps.first && c < taps.end && real_key(p, b, j))
          sum += grad * widen(at<T>(p.v, b, j, g)[d * p.v.channel]);
      }
      sums[e] += sum;
    }
  }
}

// The partial sums of a table's gradient.
struct PartialSums {
  const void* data;
  int64_t batch, heads, parts, size;  // `size` numbers for each batch row, head and part
  int64_t start, row, column;         // element [row, column] of the table within them
};

// The sum over batch rows and parts for one element of head h, in the order in which they lie.
template <class C>
CK_DEVICE C sum_parts(const PartialSums& partial, int64_t h, int64_t row, int64_t column, int first, int step) {
  const int64_t element = partial.start + row * partial.row + column * partial.column;
  C sum = 0;
#pragma unroll 4
  for (int64_t n = first; n < partial.batch * partial.parts; n += step) {
    const int64_t b = n / partial.parts, part = n % partial.parts;
    sum +=
        static_cast<const C*>(partial.data)[((b * partial.heads + h) * partial.parts + part) * partial.size + element];
  }
  return sum;
}

// Writes grad [heads, rows, columns] of a table, times `factor` and those of `scale`, or [rows, columns] if the heads
// share it. A block for 32 elements.
template <class C>
CK_GLOBAL(kSumThreads, 2)
void reduce_table(const CK_PARAM PartialSums partial, const CK_PARAM HeadTable table, void* grad, int64_t rows,
                  int64_t columns, double factor, const CK_PARAM HeadTable scale) {
  CK_SHARED(C, sums, kSumThreads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t e = int64_t{blockIdx.x} * 32 + lane;
  const int64_t h = e / (rows * columns), row = e / columns % rows, column = e % columns;
  const bool there = h < (table.per_head ? partial.heads : 1);
  C sum = 0;
  if (there)
    for (int64_t head = h; head < (table.per_head ? h + 1 : partial.heads); ++head)
      sum += sum_parts<C>(partial, head, row, column, warp, kSumWarps);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || !there) return;
  C all = 0;
  for (int w = 0; w < kSumWarps; ++w) all += sums[w * 32 + lane];
  all *= static_cast<C>(factor);
  if (scale.data != nullptr) all *= table_at<C>(scale, h, 0, 0);
  store_as(grad, e, table.dtype, all);
}

// grad_value_conv_scale: the taps' sums times the taps. A block per head.
template <class C>
CK_GLOBAL(kSumThreads, 2)
void reduce_tap_scale(const CK_PARAM AttentionBackward p, const CK_PARAM PartialSums partial) {
  CK_SHARED(C, sums, kSumThreads);
  const int64_t h = blockIdx.x, W = p.window();
  C sum = 0;
  for (int64_t e = threadIdx.x; e < (W + 1) * p.channels; e += kSumThreads) {
    const int64_t c = e / p.channels, d = e % p.channels;
    if (c == W && p.value_conv_bias.data == nullptr) break;
    const C tap = c == W ? table_at<C>(p.value_conv_bias, h, d, 0) : table_at<C>(p.value_conv, h, d, c);
    sum += tap * sum_parts<C>(partial, h, d, c, 0, 1);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int by = kSumThreads / 2; by > 0; by /= 2) {
    if (static_cast<int>(threadIdx.x) < by) sums[threadIdx.x] += sums[threadIdx.x + by];
    __syncthreads();
  }
  if (threadIdx.x == 0) store_as(p.grad_value_conv_scale, h, p.value_conv_scale.dtype, sums[0]);
}

}  // namespace ck::cuda
