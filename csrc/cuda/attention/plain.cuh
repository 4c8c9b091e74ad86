// Attention of any type, size and stride, without tensor cores: tiles of 16 queries and 32 keys, a thread for four
// pairs of the same key. A warp has four queries, so that what belongs to a row stays within it.
//
// Channels are taken kPlainSlice at a time, by blocks of their own, which all make the same scores.
#pragma once

#include "csrc/cuda/attention/common.cuh"
#include "csrc/cuda/attention/plan.h"

namespace ck::cuda {

// The scores of a tile and the products that lead to them.
template <class T>
class PlainPairs {
 public:
  using C = Compute<T>;
  static constexpr int kRows = kPlainTileRows, kKeys = kPlainTileKeys, kOwn = kRows / kPlainTileWarps;
  static constexpr int kPitch = kPlainPitch;

  CK_DEVICE PlainPairs(const Attention& p, int64_t b, int64_t h)
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        p_(p),
        b_(b),
        h_(h),
        g_(h / p.sharing()),
        a_(reinterpret_cast<C*>(shared_memory())),
        b_rows_(a_ + kRows * kPitch),
        row_edges_(b_rows_ + kKeys * kPitch),
        key_edges_(row_edges_ + 2 * kRows),
        terms_(key_edges_ + 2 * kKeys) {}

  // Shared memory that is not used here.
  CK_DEVICE C* rest() const { return terms_ + kRows * kPitch; }

  CK_DEVICE int row(int r) const { return warp * kOwn + r; }

  // Prepares for the queries of a tile: what their relative terms add left and right of the window.
  CK_DEVICE void set_queries(int first, int count) {
    query_ = first;
    queries_ = count;
    if (!p_.clips() || !p_.has_query_columns()) return;
    __syncthreads();
    if (threadIdx.x < 2 * kRows) {
      const int r = threadIdx.x % kRows, side = threadIdx.x / kRows;
      row_edges_[threadIdx.x] = r < count ? query_term(first + r, side == 0 ? 0 : p_.window() - 1) : C{0};
    }
    __syncthreads();
  }

  CK_DEVICE void set_keys(int first, int end) {
    key_ = first;
    keys_end_ = end;
    if (!p_.clips() || p_.key_rel.data == nullptr) return;
    __syncthreads();
    if (threadIdx.x < 2 * kKeys) {
      const int j = first + threadIdx.x % kKeys, side = threadIdx.x / kKeys;
      key_edges_[threadIdx.x] = j < end && real_key(p_, b_, j) ? key_term(j, side == 0 ? 0 : p_.window() - 1) : C{0};
    }
    __syncthreads();
  }

  // acc[r] += row r of `rows` times this lane's row of `keys`, both of head or group h resp. g.
  CK_DEVICE void multiply(C (&acc)[kOwn], const HeadRows& rows, const HeadRows& keys) {
    for (int64_t d0 = 0; d0 < p_.channels; d0 += 32) {
      stage_queries(rows, h_, d0, p_.channels);
      stage_keys(keys, d0);
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < 32; ++d) {
        const C key = b_rows_[lane * kPitch + d];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) acc[r] += a_[row(r) * kPitch + d] * key;
      }
      __syncthreads();
    }
  }

  // Channels d0 .. d0+31 of the queries' rows of a tensor, zeros where there are none.
  CK_DEVICE void stage_queries(const HeadRows& t, int64_t h, int64_t d0, int64_t channels) {
    for (int r = warp; r < kRows; r += kPlainTileWarps) {
      const bool there = r < queries_ && d0 + lane < channels;
      a_[r * kPitch + lane] = there ? widen(at<T>(t, b_, query_ + r, h)[(d0 + lane) * t.channel]) : C{0};
    }
  }
  CK_DEVICE void stage_keys(const HeadRows& t, int64_t d0) {
    for (int n = warp; n < kKeys; n += kPlainTileWarps) {
      const int j = key_ + n;
      const bool there = j < keys_end_ && d0 + lane < p_.channels && real_key(p_, b_, j);
      b_rows_[n * kPitch + lane] = there ? widen(at<T>(t, b_, j, g_)[(d0 + lane) * t.channel]) : C{0};
    }
  }
  CK_DEVICE const C* staged_queries() const { return a_; }
  CK_DEVICE const C* staged_keys() const { return b_rows_; }

  // For own row r and this lane's channel: its factors [rows][pitch], 0 where a pair is not seen, times the staged
  // keys. `seen`: the keys that count.
  CK_DEVICE C sum_keys(const C* factors, int r, Span seen) const {
    const C *const own = factors + row(r) * kPitch, *const keys = b_rows_ + lane;
    C sum = 0;
    for (int n = 0; n < kKeys; ++n) sum += own[n] * keys[n * kPitch];
    if (is_finite(sum)) return sum;
    // 0 times what is not finite: again, by selection.
    sum = 0;
#pragma unroll 1
    for (int n = max(0, seen.first - key_); n < min(kKeys, seen.end - key_); ++n) sum += own[n] * keys[n * kPitch];
    return sum;
  }

  // The four scores of this thread; sees[r]: whether the query attends to the key.
  CK_DEVICE void scores(C (&s)[kOwn], bool (&sees)[kOwn], const AttentionTile& tile) {
    for (int r = 0; r < kOwn; ++r) s[r] = 0;
    if (p_.qk) multiply(s, p_.q, p_.k);
    const int j = key_ + lane;
    const bool real = j < keys_end_ && real_key(p_, b_, j);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      s[r] *= static_cast<C>(p_.scale);
      const Span keys = visible_keys(p_, tile, query_ + row(r));
      sees[r] = real && row(r) < queries_ && j >= keys.first && j < keys.end;
    }
    if (!p_.has_columns()) return;
    // By way of shared memory, so that the code for a pair is there once.
    C* const added = terms_ + lane;
#pragma unroll 1
    for (int r = 0; r < kOwn; ++r) {
      const Span keys = visible_keys(p_, tile, query_ + row(r));
      const bool seen = real && row(r) < queries_ && j >= keys.first && j < keys.end;
      added[row(r) * kPitch] = seen ? relative_terms(tile, query_ + row(r), j, row(r)) : C{0};
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) s[r] += added[row(r) * kPitch];
  }

  // Multipliers of dropout.
  CK_DEVICE void draw(C (&keep)[kOwn]) const {
    for (int r = 0; r < kOwn; ++r) {
      keep[r] = 1;
      if (p_.seed == nullptr) continue;
      const int64_t i = query_ + row(r), j = key_ + lane;
      const PhiloxBlock words = pair_words(static_cast<uint64_t>(*p_.seed), b_, h_, i, j / 4);
      keep[r] = keep_factor<C>(p_, words, j);
    }
  }

  const int lane, warp;

 private:
  CK_DEVICE C relative_terms(const AttentionTile& tile, int i, int j, int row) const {
    const int c = tap_of_pair(p_, tile, i, j), W = static_cast<int>(p_.window());
    C total = 0;
    if (c >= 0 && c < W) {
      if (p_.has_query_columns()) total += query_term(i, c);
      if (p_.key_rel.data != nullptr) total += key_term(j, c);
    } else if (p_.clips()) {
      const int side = c < 0 ? 0 : 1;
      if (p_.has_query_columns()) total += row_edges_[side * kRows + row];
      if (p_.key_rel.data != nullptr) total += key_edges_[side * kKeys + lane];
    }
    return total;
  }
  CK_DEVICE C query_term(int64_t i, int64_t c) const {
    C total = 0;
    if (p_.query_rel.data != nullptr) {
      const HeadRows& rows = relative_rows(p_);
      const T* const r = at<T>(rows, b_, i, h_);
#pragma unroll 1
      for (int64_t d = 0; d < p_.rank; ++d) total += widen(r[d * rows.channel]) * table_at<C>(p_.query_rel, h_, d, c);
      total *= static_cast<C>(p_.rel_scale);
    }
    return p_.bias.data == nullptr ? total : total + table_at<C>(p_.bias, h_, 0, c);
  }
  CK_DEVICE C key_term(int64_t j, int64_t c) const {
    const T* const k = at<T>(p_.k, b_, j, g_);
    C total = 0;
#pragma unroll 1
    for (int64_t d = 0; d < p_.channels; ++d)
      total += widen(k[d * p_.k.channel]) * table_at<C>(p_.key_rel, h_, d, p_.window() - 1 - c);
    return total * static_cast<C>(p_.scale);
  }

  const Attention& p_;
  const int64_t b_, h_, g_;
  C *const a_, *const b_rows_, *const row_edges_, *const key_edges_, *const terms_;
  int query_ = 0, queries_ = 0, key_ = 0, keys_end_ = 0;
};

// Blocks: slices of channels, tiles of queries, heads, batch rows.
template <class T>
CK_GLOBAL(kPlainTileThreads, 2)
void attention_plain(const CK_PARAM AttentionForward p, int64_t tiles, int64_t slices) {
  using C = Compute<T>;
  using Pairs = PlainPairs<T>;
  const int64_t d0 = blockIdx.x % slices * kPlainSlice, unit = blockIdx.x / slices / tiles;
  const int64_t b = unit / p.heads, h = unit % p.heads;
  const int channels = static_cast<int>(min(p.channels - d0, int64_t{kPlainSlice}));
  const AttentionTile tile(p, blockIdx.x / slices % tiles, Pairs::kRows, false);
  if (tile.count <= 0) return;
  Pairs pairs(p, b, h);
  C* const weights = pairs.rest();                       // [rows][pitch]
  C* const sums = weights + Pairs::kRows * kPlainPitch;  // [rows][slice]
  const int lane = pairs.lane;
  C top[Pairs::kOwn], total[Pairs::kOwn];
#pragma unroll
  for (int r = 0; r < Pairs::kOwn; ++r) {
    top[r] = -infinity<C>();
    total[r] = 0;
    for (int d = lane; d < kPlainSlice; d += 32) sums[pairs.row(r) * kPlainSlice + d] = 0;
  }
  pairs.set_queries(tile.first, tile.count);
  const Span keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
#pragma unroll 1
  for (int j0 = keys.first; j0 < keys.end; j0 += Pairs::kKeys) {
    pairs.set_keys(j0, keys.end);
    C s[Pairs::kOwn], keep[Pairs::kOwn];
    bool sees[Pairs::kOwn];
    pairs.scores(s, sees, tile);
    pairs.draw(keep);
#pragma unroll
    for (int r = 0; r < Pairs::kOwn; ++r) {
      const C now = max(top[r], lane_max(sees[r] ? s[r] : -infinity<C>()));
      const bool counts = sees[r] && (now > -infinity<C>() || s[r] != s[r]);
      const C e = counts ? exponential(s[r] - now) : C{0};
      const C factor = total[r] == C{0} ? C{1} : exponential(top[r] - now);
      total[r] = total[r] * factor + lane_sum(e);
      top[r] = now;
      weights[pairs.row(r) * kPlainPitch + lane] = e * keep[r];
      for (int d = lane; d < channels; d += 32) sums[pairs.row(r) * kPlainSlice + d] *= factor;
    }
    for (int c = 0; c < channels; c += 32) {
      pairs.stage_keys(p.v, d0 + c);
      __syncthreads();
      for (int r = 0; r < Pairs::kOwn; ++r)
        sums[pairs.row(r) * kPlainSlice + c + lane] +=
            pairs.sum_keys(weights, r, visible_keys(p, tile, tile.first + pairs.row(r)));
      __syncthreads();
    }
  }
#pragma unroll
  for (int r = 0; r < Pairs::kOwn; ++r) {
    if (pairs.row(r) >= tile.count) continue;
    const int i = tile.first + pairs.row(r);
    const bool sees = total[r] != C{0};
    if (d0 == 0 && lane == 0) at<C>(p.lse, b, h, i) = sees ? log(total[r]) + top[r] : -infinity<C>();
    for (int d = lane; d < channels; d += 32) {
      C value = sees ? sums[pairs.row(r) * kPlainSlice + d] / total[r] : C{0};
      if (p.value_conv.data != nullptr) value += depthwise<T>(p, tile, b, h, i, d0 + d);
      at<T>(p.out, b, i, h)[(d0 + d) * p.out.channel] = narrow<T>(value);
    }
  }
}

// p of the forward pass. A row of lse -inf sees nothing.
template <class C>
CK_DEVICE C probability(bool& sees, C score, C lse) {
  sees = sees && lse != -infinity<C>();
  return sees ? exponential(score - lse) : C{0};
}

// What a gradient of a score passes on to a table: nothing where there is none, whatever the other factor holds.
template <class C>
CK_DEVICE C table_term(C ds, C factor) {
  return ds == C{0} ? C{0} : ds * factor;
}

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
  const bool relative = p.query_rel.data != nullptr, folds = p.has_query_columns();
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
    for (int c = thread; c < W; c += kPlainTileThreads) bias_sums[c] = 0;
  if (table_sums != nullptr)
    for (int c = 0; c < W; ++c)
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
      for (int d = lane; d < kPlainSlice; d += 32)
        sums[pairs.row(r) * kPlainSlice + d] = rel_sums[pairs.row(r) * kPlainSlice + d] = 0;
    }
    const Span keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
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
            const Span keys_of_row = visible_keys(p, tile, tile.first + pairs.row(r));
            sums[pairs.row(r) * kPlainSlice + c + lane] +=
                pairs.sum_keys(ds_rows, r, lse[r] == -infinity<C>() ? Span{0, 0} : keys_of_row);
          }
          __syncthreads();
        }
        if (!folds) continue;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const int first = tap_of_pair(p, tile, tile.first + pairs.row(r), j0);  // of lane 0
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
          for (int c = from + thread; c < to; c += kPlainTileThreads)
            bias_sums[c] += column_sum(c, [](int) { return C{1}; });
        if (table_sums != nullptr)
          for (int c = from; c < to; ++c)
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
    if (folds && p.clips()) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          outer[r][side] = lane_sum(outer[r][side]);
          const int64_t c = side == 0 ? 0 : W - 1;
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
        for (int d = lane; d < channels; d += 32) {
          C value = own[d] * static_cast<C>(p.scale);
          if (relative && p.rel_query.data == nullptr) value += rel[d] * rel_scale;
          at<T>(p.grad_q, b, i, h)[(d0 + d) * p.grad_q.channel] = narrow<T>(value);
        }
      if (p.grad_rel_query.data != nullptr)
        for (int d = lane; d < rank; d += 32)
          at<T>(p.grad_rel_query, b, i, h)[(d0 + d) * p.grad_rel_query.channel] = narrow<T>(rel[d] * rel_scale);
    }
    __syncthreads();
  }
}

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
  const bool scores = p.needs_keys(), folds = scores && p.key_rel.data != nullptr;
  const int W = static_cast<int>(p.window()), thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto sums_of_table = [&](int64_t h) {  // [W][channels]
    return static_cast<C*>(p.partial_key_rel) + ((b * p.heads + h) * p.key_parts + part) * W * p.channels + d0;
  };
  if (p.grad_key_rel != nullptr)
    for (int64_t n = 0; n < p.sharing() * W; ++n)
      for (int d = thread; d < channels; d += kPlainTileThreads)
        sums_of_table(g * p.sharing() + n / W)[n % W * p.channels + d] = 0;

#pragma unroll 1
  for (int64_t t = part; t < tiles; t += p.key_parts) {
    const AttentionTile tile(p, t, Pairs::kKeys, true);
    if (tile.count <= 0) continue;
    const int end = tile.first + tile.count;
    const Span queries = seeing_queries(p, tile, tile.first, end);
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
                const Span seeing = seeing_queries(p, tile, tile.first + key, tile.first + key + 1);
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
        if (!folds) continue;
        const int first = tap_of_pair(p, tile, i0, tile.first);  // of row 0 and key 0
        for (int m = 0; m < kOwnKeys; ++m) {
          const int key = warp * kOwnKeys + m;
          // Row r has column first + key - r.
          const int from = max(0, first + key - W + 1), to = min(count, first + key + 1);
          for (int d = lane; d < channels; d += 32) {
            C sum = 0;
            for (int r = from; r < to; ++r)
              sum += ds_rows[r * kPlainPitch + key] * table_at<C>(p.key_rel, h, d0 + d, W - 1 - (first + key - r));
            grad_k[key * kPlainSlice + d] += sum;
          }
        }
        if (p.grad_key_rel != nullptr)
          for (int c = max(0, first - count + 1); c < min(W, first + Pairs::kKeys); ++c)
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
      if (folds && p.clips()) {
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
            for (int d = lane; d < channels; d += 32)
              grad_k[key * kPlainSlice + d] += edge_of(side, key) * table_at<C>(p.key_rel, h, d0 + d, W - 1 - c);
          }
          if (p.grad_key_rel != nullptr)
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
      for (int d = lane; d < channels; d += 32) {
        if (p.grad_k.data != nullptr)
          at<T>(p.grad_k, b, j, g)[(d0 + d) * p.grad_k.channel] =
              narrow<T>(real ? grad_k[key * kPlainSlice + d] * static_cast<C>(p.scale) : C{0});
        if (p.grad_v.data == nullptr) continue;
        C value = grad_v[key * kPlainSlice + d];
        if (p.value_conv.data != nullptr && real)
          for (int64_t n = 0; n < p.sharing(); ++n)
            value += depthwise_grad<T>(p, tile, b, g * p.sharing() + n, j, d0 + d);
        at<T>(p.grad_v, b, j, g)[(d0 + d) * p.grad_v.channel] = narrow<T>(real ? value : C{0});
      }
    }
    __syncthreads();
  }
}

}  // namespace ck::cuda
