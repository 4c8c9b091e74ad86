// What the forward passes on tensor cores share: the steps of the online softmax, and the depthwise term.
#pragma once

#include "csrc/cuda/attention/scores.cuh"

namespace ck::cuda {

// The depthwise term for 8 channels of a row, added to `value`.
template <class T>
CK_DEVICE void add_taps(float (&value)[8], const AttentionForward& p, const TensorTables& t, const AttentionTile& tile,
                        int64_t b, int64_t h, int i, int d) {
  const int64_t g = h / p.sharing();
  const float* const taps = t.taps + h * p.window() * t.channel_pitch + d;
  const Range range = taps_of(p, tile, i);
  const int start = i + tile.shift - static_cast<int>(p.left), count = min(8, static_cast<int>(p.channels) - d);
#pragma unroll 1
  for (int c = range.first; c < range.end; ++c) {
    if (!real_key(p, b, start + c)) continue;
    const float* const tap = taps + c * t.channel_pitch;
    float v[8];
    load_channels(v, at<T>(p.v, b, start + c, g) + d * p.v.channel, p.v.channel, count, t.vectors);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += tap[e] * v[e];
  }
  if (p.value_conv_bias.data == nullptr) return;
  const float scale = tap_scale<float>(p, h);
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < count) value[e] += table_at<float>(p.value_conv_bias, h, d + e, 0) * scale;
}

// One step of the online softmax, for 16 queries and a tile of keys: from products s to exp2(score - maximum), which
// are added to total after that has been scaled by `shrink`, like everything that was summed before. Returns whether
// some maximum grows.
template <int kX>
CK_DEVICE bool update_softmax(float (&s)[kX][4], const ScoreTerms& terms, float (&top)[2], float (&total)[2],
                              float (&shrink)[2]) {
  bool grows = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = -infinity<float>();
#pragma unroll
    for (int x = 0; x < kX; ++x) highest = fmaxf(highest, fmaxf(s[x][2 * half], s[x][2 * half + 1]));
    highest = row_max(highest);
    const float now = fmaxf(top[half], highest * terms.factor + terms.added[half]);
    const float shift = now == -infinity<float>() ? 0.0f : now;
    const float constant = terms.added[half] - shift;
    shrink[half] = fast_exp2(top[half] - shift);
    grows = grows || now > top[half];
    top[half] = now;
    float sum = 0;
#pragma unroll
    for (int x = 0; x < kX; ++x)
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[x][e] = fast_exp2(s[x][e] * terms.factor + constant);
        sum += s[x][e];
      }
    total[half] = total[half] * shrink[half] + sum;
  }
  return grows;
}

}  // namespace ck::cuda
