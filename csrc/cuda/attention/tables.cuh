// The tables of relative terms and of the depthwise term in the form that the tensor kernels read: see TensorTables.
#pragma once

#include "csrc/cuda/attention/common.cuh"
#include "csrc/cuda/attention/plan.h"

namespace ck::cuda {

// Splits query_rel and key_rel into terms of T, and scales bias and taps. A thread takes an element of each at a time.
template <class T>
CK_GLOBAL(kTensorThreads, 2)
void attention_tables(const CK_PARAM Attention p, const CK_PARAM TensorTables t) {
  const int64_t W = p.window(), step = int64_t{gridDim.x} * kTensorThreads;
  const int64_t begin = int64_t{blockIdx.x} * kTensorThreads + threadIdx.x;
  // [heads][terms][window][pitch]
  const auto split = [&](const HeadTable& from, void* to, int64_t terms, int64_t rows, int64_t pitch, bool reverse) {
    if (from.data == nullptr) return;
    for (int64_t e = begin; e < (from.per_head ? p.heads : 1) * W * pitch; e += step) {
      const int64_t d = e % pitch, c = e / pitch % W, h = e / pitch / W;
      float value = d < rows ? table_at<float>(from, h, d, reverse ? W - 1 - c : c) : 0;
      for (int64_t term = 0; term < terms; ++term) {
        const T rounded = narrow<T>(value);
        static_cast<T*>(to)[((h * terms + term) * W + c) * pitch + d] = rounded;
        value -= widen(rounded);
      }
    }
  };
  split(p.query_rel, t.query_rel, t.query_terms, p.rank, t.rank_pitch, false);
  split(p.key_rel, t.key_rel, t.key_terms, p.channels, t.channel_pitch, true);
  if (t.bias != nullptr)
    for (int64_t e = begin; e < p.heads * W; e += step) t.bias[e] = table_at<float>(p.bias, e / W, 0, e % W) * kLog2e;
  if (t.taps != nullptr)
    for (int64_t e = begin; e < p.heads * W * t.channel_pitch; e += step) {
      const int64_t d = e % t.channel_pitch, c = e / t.channel_pitch % W, h = e / t.channel_pitch / W;
      t.taps[e] = d < p.channels ? table_at<float>(p.value_conv, h, d, c) * tap_scale<float>(p, h) : 0;
    }
}

// key_edges, or query_edges [batch, heads, 2, positions]: what the relative terms of each key, or query, add left and
// right of the window, times log2(e). A warp per position.
template <class T>
CK_GLOBAL(kTensorThreads, 2)
void attention_edges(const CK_PARAM Attention p, float* edges, bool keys) {
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t{blockIdx.x} * (kTensorThreads / 32) + threadIdx.x / 32;
  const int64_t positions = keys ? p.keys : p.queries, W = p.window();
  if (n >= p.batch * p.heads * positions) return;
  const int64_t i = n % positions, unit = n / positions, b = unit / p.heads, h = unit % p.heads;
  const HeadTable& table = keys ? p.key_rel : p.query_rel;
  const HeadRows& rows = keys ? p.k : relative_rows(p);
  float left = 0, right = 0;
  if (table.data != nullptr && (!keys || real_key(p, b, i)))
    for (int64_t d = lane; d < (keys ? p.channels : p.rank); d += 32) {
      const float x = widen(at<T>(rows, b, i, keys ? h / p.sharing() : h)[d * rows.channel]);
      left += x * table_at<float>(table, h, d, keys ? W - 1 : 0);
      right += x * table_at<float>(table, h, d, keys ? 0 : W - 1);
    }
  const float factor = static_cast<float>(keys ? p.scale : p.rel_scale);
  left = lane_sum(left) * factor;
  right = lane_sum(right) * factor;
  if (!keys && p.bias.data != nullptr) {
    left += table_at<float>(p.bias, h, 0, 0);
    right += table_at<float>(p.bias, h, 0, W - 1);
  }
  if (lane == 0) {
    edges[unit * 2 * positions + i] = left * kLog2e;
    edges[(unit * 2 + 1) * positions + i] = right * kLog2e;
  }
}

}  // namespace ck::cuda
