// The backward pass of attention of any type, size and stride, first part: d(q), d(rel_query), delta and the sums for
// the tables of queries.
#pragma once

#include "csrc/cuda/attention/plain.cuh"

namespace ck::cuda {

// The gradients on the side of the queries, and delta. Blocks: slices of channels and of the rank, parts, heads, batch
// rows; a block takes every query_parts-th tile.
template <class T>
CK_GLOBAL(kPlainTileThreads, 2)
void attention_plain_queries(const CK_PARAM AttentionBackward p, int64_t tiles, int64_t slices) {
  using C = Compute<T>;
  using Pairs = PlainPairs<T>;
  constexpr int kOwn = Pairs::kOwn;
  const int64_t d0 = blockIdx.x % slices * kPlainSlice, unit = blockIdx.x / slices / p.query_parts;
  const int64_t part = blockIdx.x / slices % p.query_parts, b = unit / p.heads, h = unit % p.heads;
  const int channels = static_cast<int>(max(int64_t{0}, min(p.channels - d0, int64_t{kPlainSlice})));
  const bool relative = p.query_rel.data != nullptr, has_columns = p.has_query_columns();
  const int rank = relative ? static_cast<int>(max(int64_t{0}, min(p.rank - d0, int64_t{kPlainSlice}))) : 0;
  const int W = static_cast<int>(p.window());
  Pairs pairs(p, b, h);
  C* const ds_rows = pairs.rest();                             // [rows][pitch]
  C* const sums = ds_rows + Pairs::kRows * kPlainPitch;        // [rows][slice], of grad_q
  C* const rel_sums = sums + Pairs::kRows * kPlainSlice;       // [rows][slice], of the gradient of relative_rows()
  C* const edge_sums = rel_sums + Pairs::kRows * kPlainSlice;  // [2][rows]
  const int lane = pairs.lane, thread = threadIdx.x;
  const int64_t piece = unit * p.query_parts + part;
  C* const bias_sums = p.grad_bias != nullptr && d0 == 0 ? static_cast<C*>(p.partial_bias) + piece * W : nullptr;
  C* const table_sums = p.grad_query_rel != nullptr ? static_cast<C*>(p.partial_query_rel) + piece * W * p.rank + d0
                                                    : nullptr;  // [W][rank]
  if (bias_sums != nullptr)
#pragma unroll 1
    for (int c = thread; c < W; c += kPlainTileThreads) bias_sums[c] = 0;
  if (table_sums != nullptr)
#pragma unroll 1
    for (int c = 0; c < W; ++c)
#pragma unroll 1
      for (int d = thread; d < rank; d += kPlainTileThreads) table_sums[c * p.rank + d] = 0;

#pragma unroll 1
  for (int64_t t = part; t < tiles; t += p.query_parts) {
    const AttentionTile tile(p, t, Pairs::kRows, false);
    if (tile.count <= 0) continue;
    pairs.set_queries(tile.first, tile.count);
    C lse[kOwn], delta[kOwn], outer[kOwn][2];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int i = tile.first + pairs.row(r);
      lse[r] = pairs.row(r) < tile.count ? at<C>(p.lse, b, h, i) : C{0};
      delta[r] = outer[r][0] = outer[r][1] = 0;
#pragma unroll 1
      for (int d = lane; d < kPlainSlice; d += 32)
        sums[pairs.row(r) * kPlainSlice + d] = rel_sums[pairs.row(r) * kPlainSlice + d] = 0;
    }
    const Range keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      // The first pass makes delta: sum of p dP.
#pragma unroll 1
      for (int j0 = keys.first; j0 < keys.end; j0 += Pairs::kKeys) {
        pairs.set_keys(j0, keys.end);
        C s[kOwn], dp[kOwn] = {}, keep[kOwn];
        bool sees[kOwn];
        pairs.scores(s, sees, tile);
        pairs.multiply(dp, p.grad, p.v);
        pairs.draw(keep);
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const C probable = probability(sees[r], s[r], lse[r]);
          if (pass == 0) {
            delta[r] += sees[r] ? probable * keep[r] * dp[r] : C{0};
            continue;
          }
          const C ds = sees[r] ? probable * (keep[r] * dp[r] - delta[r]) : C{0};
          ds_rows[pairs.row(r) * kPlainPitch + lane] = ds;
          const int c = tap_of_pair(p, tile, tile.first + pairs.row(r), j0 + lane);
          if (c < 0) outer[r][0] += ds;
          if (c >= W) outer[r][1] += ds;
        }
        if (pass == 0) continue;
        for (int c = 0; c < channels && p.qk; c += 32) {
          pairs.stage_keys(p.k, d0 + c);
          __syncthreads();
#pragma unroll
          for (int r = 0; r < kOwn; ++r) {
            const Range keys_of_row = visible_keys(p, tile, tile.first + pairs.row(r));
            sums[pairs.row(r) * kPlainSlice + c + lane] +=
                pairs.sum_keys(ds_rows, r, lse[r] == -infinity<C>() ? Range{0, 0} : keys_of_row);
          }
          __syncthreads();
        }
        if (!has_columns) continue;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int first = tap_of_pair(p, tile, tile.first + pairs.row(r), j0);  // of lane 0
#pragma unroll 1
          for (int d = lane; d < rank; d += 32) {
            C sum = 0;
            for (int c = max(0, first); c < min(W, first + Pairs::kKeys); ++c)
              sum += ds_rows[pairs.row(r) * kPlainPitch + c - first] * table_at<C>(p.query_rel, h, d0 + d, c);
            rel_sums[pairs.row(r) * kPlainSlice + d] += sum;
          }
        }
        const int first = tap_of_pair(p, tile, tile.first, j0);  // of row 0; row r begins r columns before
        const int from = max(0, first - Pairs::kRows + 1), to = min(W, first + Pairs::kKeys);
        const auto column_sum = [&](int c, const auto& value) {
          C sum = 0;
          for (int r = 0; r < tile.count; ++r) {
            const int n = c - first + r;
            if (n >= 0 && n < Pairs::kKeys) sum += table_term(ds_rows[r * kPlainPitch + n], value(r));
          }
          return sum;
        };
        if (bias_sums != nullptr)
#pragma unroll 1
          for (int c = from + thread; c < to; c += kPlainTileThreads)
            bias_sums[c] += column_sum(c, [](int) { return C{1}; });
        if (table_sums != nullptr)
#pragma unroll 1
          for (int c = from; c < to; ++c)
#pragma unroll 1
            for (int d = thread; d < rank; d += kPlainTileThreads)
              table_sums[c * p.rank + d] += column_sum(c, [&](int r) {
                const HeadRows& rows = relative_rows(p);
                return static_cast<C>(widen(at<T>(rows, b, tile.first + r, h)[(d0 + d) * rows.channel]));
              });
        __syncthreads();
      }
      if (pass == 0) {
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          delta[r] = lane_sum(delta[r]);
          const int i = tile.first + pairs.row(r);
          if (pairs.row(r) >= tile.count) continue;
          if (p.grad_lse.data != nullptr && lse[r] != -infinity<C>()) delta[r] -= at<C>(p.grad_lse, b, h, i);
          if (lane == 0 && d0 == 0) static_cast<C*>(p.delta)[(b * p.heads + h) * p.queries + i] = delta[r];
        }
        if (!p.needs_queries()) break;
      }
    }
    if (!p.needs_queries()) continue;
    if (has_columns && p.clips()) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          outer[r][side] = lane_sum(outer[r][side]);
          const int64_t c = side == 0 ? 0 : W - 1;
#pragma unroll 1
          for (int d = lane; d < rank; d += 32)
            rel_sums[pairs.row(r) * kPlainSlice + d] += outer[r][side] * table_at<C>(p.query_rel, h, d0 + d, c);
          if (lane == 0) edge_sums[side * Pairs::kRows + pairs.row(r)] = outer[r][side];
        }
      __syncthreads();
      for (int side = 0; side < 2; ++side) {
        const int c = side == 0 ? 0 : W - 1;
        for (int r = 0; r < tile.count; ++r) {
          const C sum = edge_sums[side * Pairs::kRows + r];
          const HeadRows& rows = relative_rows(p);
          // The threads that own these elements.
          if (bias_sums != nullptr && thread == 0) bias_sums[c] += sum;
          if (table_sums != nullptr)
#pragma unroll 1
            for (int d = thread; d < rank; d += kPlainTileThreads)
              table_sums[c * p.rank + d] +=
                  table_term(sum, widen(at<T>(rows, b, tile.first + r, h)[(d0 + d) * rows.channel]));
        }
        __syncthreads();
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      if (pairs.row(r) >= tile.count) continue;
      const int i = tile.first + pairs.row(r);
      const C *const own = sums + pairs.row(r) * kPlainSlice, *const rel = rel_sums + pairs.row(r) * kPlainSlice;
      const C rel_scale = static_cast<C>(p.rel_scale);
      if (p.grad_q.data != nullptr)
#pragma unroll 1
        for (int d = lane; d < channels; d += 32) {
          C value = own[d] * static_cast<C>(p.scale);
          if (relative && p.rel_query.data == nullptr) value += rel[d] * rel_scale;
          at<T>(p.grad_q, b, i, h)[(d0 + d) * p.grad_q.channel] = narrow<T>(value);
        }
      if (p.grad_rel_query.data != nullptr)
#pragma unroll 1
        for (int d = lane; d < rank; d += 32)
          at<T>(p.grad_rel_query, b, i, h)[(d0 + d) * p.grad_rel_query.channel] = narrow<T>(rel[d] * rel_scale);
    }
    __syncthreads();
  }
}

}  // namespace ck::cuda
