// What all kernels of attention share: tiles of positions, which pairs attend, elements of the inputs.
#pragma once

#include "csrc/cuda/attention/problem.h"
#include "csrc/cuda/device/dropout.cuh"
#include "csrc/cuda/device/reduce.cuh"

namespace ck::cuda {

// Up to `size` queries, or keys, one after the other and of one sequence.
struct AttentionTile {
  int first, count;                                // count <= 0: nothing to do
  int query_begin, query_end, key_begin, key_end;  // the sequence
  int shift;                                       // query i stands at i + shift among the keys

  CK_DEVICE int end() const { return first + count; }

  // Number `tile` of those that attention_tiles() counts; `keys`: of keys, not of queries. `aligned`: it begins at a
  // multiple of its size, which may lie before its sequence.
  CK_DEVICE AttentionTile(const Attention& p, int64_t tile, int size, bool keys, bool aligned = false) {
    query_begin = key_begin = 0;
    query_end = static_cast<int>(p.queries);
    key_end = static_cast<int>(p.keys);
    if (p.query_offsets == nullptr) {
      first = static_cast<int>(tile) * size;
    } else {
      // Sequence n has the tiles from offset / size + n on, which is as many as it needs at least.
      int low = 0, high = static_cast<int>(p.sequences);
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (offset(p, middle, keys) / size + middle <= tile ? low : high) = middle;
      }
      query_begin = offset(p, low, false), query_end = offset(p, low + 1, false);
      key_begin = offset(p, low, true), key_end = offset(p, low + 1, true);
      const int begin = keys ? key_begin : query_begin;
      first = (static_cast<int>(tile) - low) * size + (aligned ? 0 : begin % size);
    }
    count = min(size, (keys ? key_end : query_end) - first);
    shift = key_end - query_end;
  }

 private:
  // Offsets are not validated on the host; they are clamped to the tensors.
  static CK_DEVICE int offset(const Attention& p, int n, bool keys) {
    const void* const data = keys ? p.key_offsets : p.query_offsets;
    const bool wide = keys ? p.wide_key_offsets : p.wide_query_offsets;
    const int64_t value = wide ? static_cast<const int64_t*>(data)[n] : static_cast<const int32_t*>(data)[n];
    return static_cast<int>(min(max(value, int64_t{0}), keys ? p.keys : p.queries));
  }
};

// Positions from `first` to before `end`.
struct Range {
  int first, end;
};

// The keys that query i sees, padding aside.
CK_DEVICE Range visible_keys(const Attention& p, const AttentionTile& tile, int i) {
  const int place = i + tile.shift, left = static_cast<int>(p.left), right = static_cast<int>(p.right);
  Range keys{tile.key_begin, tile.key_end};
  if (p.causal) keys.end = min(keys.end, place + 1);
  if (p.outside == Outside::kMask) {
    keys.first = max(keys.first, place - left);
    keys.end = min(keys.end, place + right + 1);
  }
  return keys;
}

// The keys that some query from `first` to before `end` sees.
CK_DEVICE Range visible_keys(const Attention& p, const AttentionTile& tile, int first, int end) {
  return {visible_keys(p, tile, first).first, visible_keys(p, tile, end - 1).end};
}

// The queries of the sequence that see some key from `first` to before `end`.
CK_DEVICE Range seeing_queries(const Attention& p, const AttentionTile& tile, int first, int end) {
  const int left = static_cast<int>(p.left), right = static_cast<int>(p.right);
  Range queries{tile.query_begin, tile.query_end};
  if (p.causal) queries.first = max(queries.first, first - tile.shift);
  if (p.outside == Outside::kMask) {
    queries.first = max(queries.first, first - right - tile.shift);
    queries.end = min(queries.end, end + left - tile.shift);
  }
  return queries;
}

template <class T>
CK_DEVICE T* at(const HeadRows& t, int64_t b, int64_t i, int64_t h) {
  return static_cast<T*>(t.data) + b * t.batch + i * t.time + h * t.head;
}

template <class C>
CK_DEVICE C& at(const HeadScalars& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<C*>(t.data)[b * t.batch + h * t.head + i * t.time];
}

// Tables are float64 if and only if everything is.
template <class C>
CK_DEVICE C table_at(const HeadTable& t, int64_t h, int64_t row, int64_t column) {
  const int64_t index = h * t.head + row * t.row + column * t.column;
  if constexpr (sizeof(C) == 8) {
    return static_cast<const double*>(t.data)[index];
  } else {
    if (t.dtype == Dtype::kFloat32) return static_cast<const float*>(t.data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(t.data)[index];
    return t.dtype == Dtype::kBFloat16 ? widen(bf16{bits}) : widen(f16{bits});
  }
}

CK_DEVICE bool real_key(const Attention& p, int64_t b, int64_t j) {
  return p.key_mask == nullptr || p.key_mask[b * p.mask_batch + j * p.mask_key];
}

// Random words of elements 4 quad .. 4 quad + 3 of row i of p.
CK_DEVICE PhiloxBlock pair_words(uint64_t seed, int64_t b, int64_t h, int64_t i, int64_t quad) {
  return tap_words(seed, b, i, h, quad);
}

// The rows that query_rel is multiplied with.
CK_DEVICE const HeadRows& relative_rows(const Attention& p) { return p.rel_query.data != nullptr ? p.rel_query : p.q; }

// The tap of value_conv that reads key j for query i.
CK_DEVICE int tap_of_pair(const Attention& p, const AttentionTile& tile, int i, int j) {
  return j - i - tile.shift + static_cast<int>(p.left);
}

// Taps of the depthwise term whose values exist, for query i.
CK_DEVICE Range taps_of(const Attention& p, const AttentionTile& tile, int i) {
  const int start = i + tile.shift - static_cast<int>(p.left);
  const int taps = static_cast<int>(p.causal ? p.left + 1 : p.window());
  return {max(0, tile.key_begin - start), min(taps, tile.key_end - start)};
}

template <class C>
CK_DEVICE C tap_scale(const Attention& p, int64_t h) {
  return p.value_conv_scale.data == nullptr ? C{1} : table_at<C>(p.value_conv_scale, h, 0, 0);
}

// The depthwise term of query i, channel d.
template <class T>
CK_DEVICE Compute<T> depthwise(const Attention& p, const AttentionTile& tile, int64_t b, int64_t h, int i, int64_t d) {
  using C = Compute<T>;
  const int64_t g = h / p.sharing();
  C total = p.value_conv_bias.data == nullptr ? C{0} : table_at<C>(p.value_conv_bias, h, d, 0);
  const Range taps = taps_of(p, tile, i);
#pragma unroll 1
  for (int c = taps.first; c < taps.end; ++c) {
    const int64_t j = int64_t{i} + tile.shift - p.left + c;
    if (real_key(p, b, j)) total += table_at<C>(p.value_conv, h, d, c) * widen(at<T>(p.v, b, j, g)[d * p.v.channel]);
  }
  return total * tap_scale<C>(p, h);
}

// The gradient of channel d of value j through the depthwise terms of the queries of head h.
template <class T>
CK_DEVICE Compute<T> depthwise_grad(const AttentionBackward& p, const AttentionTile& tile, int64_t b, int64_t h, int j,
                                    int64_t d) {
  using C = Compute<T>;
  const int left = static_cast<int>(p.left), taps = static_cast<int>(p.causal ? p.left + 1 : p.window());
  // Query i reads j by tap j - i - shift + left.
  const int last = j - tile.shift + left;
  const int from = max(0, last - (tile.query_end - 1)), to = min(taps, last - tile.query_begin + 1);
  C total = 0;
#pragma unroll 1
  for (int c = from; c < to; ++c)
    total += table_at<C>(p.value_conv, h, d, c) * widen(at<T>(p.grad, b, last - c, h)[d * p.grad.channel]);
  return total * tap_scale<C>(p, h);
}

template <class C>
CK_DEVICE bool is_finite(C value) {
  return value - value == C{0};
}

}  // namespace ck::cuda
