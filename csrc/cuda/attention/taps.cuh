// The depthwise term of the kernels on tensor cores, and its gradient, for 8 channels of a row.
#pragma once

#include "csrc/cuda/attention/fragments.cuh"

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

// Adds to 8 channels of the gradient of value j those that come through the depthwise terms of the queries of head h.
template <class T>
CK_DEVICE void add_tap_grads(float (&value)[8], const AttentionBackward& p, const TensorTables& t,
                             const AttentionTile& tile, int64_t b, int64_t h, int j, int d) {
  const float* const taps = t.taps + h * p.window() * t.channel_pitch + d;
  // Query i reads j by tap last - i.
  const int last = j - tile.shift + static_cast<int>(p.left);
  const int count = static_cast<int>(p.causal ? p.left + 1 : p.window()), channels = static_cast<int>(p.channels) - d;
  const int from = max(0, last - (tile.query_end - 1)), to = min(count, last - tile.query_begin + 1);
#pragma unroll 1
  for (int c = from; c < to; ++c) {
    const float* const tap = taps + c * t.channel_pitch;
    float grad[8];
    load_channels(grad, at<T>(p.grad, b, last - c, h) + d * p.grad.channel, p.grad.channel, channels, t.vectors);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += tap[e] * grad[e];
  }
}

}  // namespace ck::cuda
