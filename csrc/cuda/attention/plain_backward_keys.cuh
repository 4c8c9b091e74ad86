// The backward pass of attention of any type, size and stride, second part: d(k), d(v) and the sums for key_rel. Needs
// delta.
#pragma once

#include "csrc/cuda/attention/plain.cuh"

namespace ck::cuda {

// The gradients on the side of the keys. Blocks: slices of channels, parts, groups, batch rows; a block takes every
// key_parts-th tile.
template <class T>
CK_GLOBAL(kPlainTileThreads, 2)
void attention_plain_keys(const CK_PARAM AttentionBackward p, int64_t tiles, int64_t slices) {
  using C = Compute<T>;
  using Pairs = PlainPairs<T>;
  constexpr int kOwn = Pairs::kOwn, kOwnKeys = Pairs::kKeys / kPlainTileWarps;
  const int64_t d0 = blockIdx.x % slices * kPlainSlice, unit = blockIdx.x / slices / p.key_parts;
  const int64_t part = blockIdx.x / slices % p.key_parts, b = unit / p.groups, g = unit % p.groups;
  const int channels = static_cast<int>(min(p.channels - d0, int64_t{kPlainSlice}));
  const bool scores = p.needs_keys(), has_columns = scores && p.key_rel.data != nullptr;
  const int W = static_cast<int>(p.window()), thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto sums_of_table = [&](int64_t h) {  // [W][channels]
    return static_cast<C*>(p.partial_key_rel) + ((b * p.heads + h) * p.key_parts + part) * W * p.channels + d0;
  };
  if (p.grad_key_rel != nullptr)
#pragma unroll 1
    for (int64_t n = 0; n < p.sharing() * W; ++n)
#pragma unroll 1
      for (int d = thread; d < channels; d += kPlainTileThreads)
        sums_of_table(g * p.sharing() + n / W)[n % W * p.channels + d] = 0;

#pragma unroll 1
  for (int64_t t = part; t < tiles; t += p.key_parts) {
    const AttentionTile tile(p, t, Pairs::kKeys, true);
    if (tile.count <= 0) continue;
    const int end = tile.first + tile.count;
    const Range queries = seeing_queries(p, tile, tile.first, end);
    C *grad_k = nullptr, *grad_v = nullptr;  // [keys][slice]
#pragma unroll 1
    for (int64_t n = 0; n < p.sharing(); ++n) {
      const int64_t h = g * p.sharing() + n;
      Pairs pairs(p, b, h);
      C* const p_rows = pairs.rest();                          // [rows][pitch]
      C* const ds_rows = p_rows + Pairs::kRows * kPlainPitch;  // [rows][pitch]
      C* const edges = ds_rows + Pairs::kRows * kPlainPitch;   // [2][warps][keys]
      grad_k = edges + 2 * kPlainTileThreads;
      grad_v = grad_k + Pairs::kKeys * kPlainSlice;
      if (n == 0)
#pragma unroll 1
        for (int e = thread; e < 2 * Pairs::kKeys * kPlainSlice; e += kPlainTileThreads) grad_k[e] = 0;
      __syncthreads();
      C outer[2] = {};
      pairs.set_keys(tile.first, end);
#pragma unroll 1
      for (int i0 = queries.first; i0 < queries.end; i0 += Pairs::kRows) {
        const int count = min(Pairs::kRows, queries.end - i0);
        pairs.set_queries(i0, count);
        C s[kOwn], dp[kOwn] = {}, keep[kOwn];
        bool sees[kOwn];
        pairs.scores(s, sees, tile);
        if (scores) pairs.multiply(dp, p.grad, p.v);
        pairs.draw(keep);
        for (int r = 0; r < kOwn; ++r) {
          const int i = i0 + pairs.row(r);
          const C probable = probability(sees[r], s[r], sees[r] ? at<C>(p.lse, b, h, i) : C{0});
          p_rows[pairs.row(r) * kPlainPitch + lane] = probable * keep[r];
          C ds = 0;
          if (scores && sees[r])
            ds = probable * (keep[r] * dp[r] - static_cast<const C*>(p.delta)[(b * p.heads + h) * p.queries + i]);
          ds_rows[pairs.row(r) * kPlainPitch + lane] = ds;
          const int c = tap_of_pair(p, tile, i, tile.first + lane);
          if (c < 0) outer[0] += ds;
          if (c >= W) outer[1] += ds;
        }
        __syncthreads();
        const auto accumulate = [&](const HeadRows& rows, const C* factors, C* sums) {
          for (int c = 0; c < channels; c += 32) {
            pairs.stage_queries(rows, h, d0 + c, p.channels);
            __syncthreads();
            for (int m = 0; m < kOwnKeys; ++m) {
              const int key = warp * kOwnKeys + m;
              C sum = 0;
              for (int r = 0; r < Pairs::kRows; ++r)
                sum += factors[r * kPlainPitch + key] * pairs.staged_queries()[r * kPlainPitch + lane];
              if (!is_finite(sum)) {
                // As in sum_keys().
                const Range seeing = seeing_queries(p, tile, tile.first + key, tile.first + key + 1);
                sum = 0;
#pragma unroll 1
                for (int r = max(0, seeing.first - i0); r < min(count, seeing.end - i0); ++r)
                  if (at<C>(p.lse, b, h, i0 + r) != -infinity<C>())
                    sum += factors[r * kPlainPitch + key] * pairs.staged_queries()[r * kPlainPitch + lane];
              }
              sums[key * kPlainSlice + c + lane] += sum;
            }
            __syncthreads();
          }
        };
        accumulate(p.grad, p_rows, grad_v);
        if (!scores) continue;
        if (p.qk) accumulate(p.q, ds_rows, grad_k);
        if (!has_columns) continue;
        const int first = tap_of_pair(p, tile, i0, tile.first);  // of row 0 and key 0
        for (int m = 0; m < kOwnKeys; ++m) {
          const int key = warp * kOwnKeys + m;
          // Row r has column first + key - r.
          const int from = max(0, first + key - W + 1), to = min(count, first + key + 1);
#pragma unroll 1
          for (int d = lane; d < channels; d += 32) {
            C sum = 0;
            for (int r = from; r < to; ++r)
              sum += ds_rows[r * kPlainPitch + key] * table_at<C>(p.key_rel, h, d0 + d, W - 1 - (first + key - r));
            grad_k[key * kPlainSlice + d] += sum;
          }
        }
        if (p.grad_key_rel != nullptr)
#pragma unroll 1
          for (int c = max(0, first - count + 1); c < min(W, first + Pairs::kKeys); ++c)
#pragma unroll 1
            for (int d = thread; d < channels; d += kPlainTileThreads) {
              C sum = 0;
              for (int r = max(0, first - c); r < min(count, first - c + tile.count); ++r)
                if (real_key(p, b, tile.first + c - first + r))
                  sum += table_term(ds_rows[r * kPlainPitch + c - first + r],
                                    widen(at<T>(p.k, b, tile.first + c - first + r, g)[(d0 + d) * p.k.channel]));
              sums_of_table(h)[c * p.channels + d] += sum;
            }
        __syncthreads();
      }
      if (has_columns && p.clips()) {
        for (int side = 0; side < 2; ++side) edges[side * kPlainTileThreads + warp * Pairs::kKeys + lane] = outer[side];
        __syncthreads();
        const auto edge_of = [&](int side, int key) {
          C sum = 0;
          for (int w = 0; w < kPlainTileWarps; ++w) sum += edges[side * kPlainTileThreads + w * Pairs::kKeys + key];
          return sum;
        };
        for (int side = 0; side < 2; ++side) {
          const int c = side == 0 ? 0 : W - 1;
          for (int m = 0; m < kOwnKeys; ++m) {
            const int key = warp * kOwnKeys + m;
#pragma unroll 1
            for (int d = lane; d < channels; d += 32)
              grad_k[key * kPlainSlice + d] += edge_of(side, key) * table_at<C>(p.key_rel, h, d0 + d, W - 1 - c);
          }
          if (p.grad_key_rel != nullptr)
#pragma unroll 1
            for (int d = thread; d < channels; d += kPlainTileThreads) {
              C sum = 0;
              for (int key = 0; key < tile.count; ++key)
                if (real_key(p, b, tile.first + key))
                  sum +=
                      table_term(edge_of(side, key), widen(at<T>(p.k, b, tile.first + key, g)[(d0 + d) * p.k.channel]));
              sums_of_table(h)[c * p.channels + d] += sum;
            }
        }
        __syncthreads();
      }
    }
    for (int m = 0; m < kOwnKeys; ++m) {
      const int key = warp * kOwnKeys + m, j = tile.first + key;
      if (key >= tile.count) continue;
      const bool real = real_key(p, b, j);
#pragma unroll 1
      for (int d = lane; d < channels; d += 32) {
        if (p.grad_k.data != nullptr)
          at<T>(p.grad_k, b, j, g)[(d0 + d) * p.grad_k.channel] =
              narrow<T>(real ? grad_k[key * kPlainSlice + d] * static_cast<C>(p.scale) : C{0});
        if (p.grad_v.data == nullptr) continue;
        C value = grad_v[key * kPlainSlice + d];
        if (p.value_conv.data != nullptr && real)
#pragma unroll 1
          for (int64_t n = 0; n < p.sharing(); ++n)
            value += depthwise_grad<T>(p, tile, b, g * p.sharing() + n, j, d0 + d);
        at<T>(p.grad_v, b, j, g)[(d0 + d) * p.grad_v.channel] = narrow<T>(real ? value : C{0});
      }
    }
    __syncthreads();
  }
}

}  // namespace ck::cuda
