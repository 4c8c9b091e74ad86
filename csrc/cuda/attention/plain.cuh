// Attention of any type, size and stride, without tensor cores: tiles of 16 queries and 32 keys. A warp has four
// queries and a lane one key, so that sums over a row stay within a warp.
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

  // For own row r and this lane's channel: its factors [rows][pitch], 0 where a pair is not seen, times the staged
  // keys. `seen`: the keys that count.
  CK_DEVICE C sum_keys(const C* factors, int r, Range seen) const {
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
      const Range keys = visible_keys(p_, tile, query_ + row(r));
      sees[r] = real && row(r) < queries_ && j >= keys.first && j < keys.end;
    }
    if (!p_.has_columns()) return;
    // Through shared memory, in a loop that is not unrolled: the code for a pair is long.
    C* const added = terms_ + lane;
#pragma unroll 1
    for (int r = 0; r < kOwn; ++r) {
      const Range keys = visible_keys(p_, tile, query_ + row(r));
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

// Of the backward pass: the probability of a pair. A row of lse -inf sees nothing.
template <class C>
CK_DEVICE C probability(bool& sees, C score, C lse) {
  sees = sees && lse != -infinity<C>();
  return sees ? exponential(score - lse) : C{0};
}

// The share of a table's gradient that comes from one score: 0 where ds is 0, even if the factor is not finite.
template <class C>
CK_DEVICE C table_term(C ds, C factor) {
  return ds == C{0} ? C{0} : ds * factor;
}

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
#pragma unroll 1
    for (int d = lane; d < kPlainSlice; d += 32) sums[pairs.row(r) * kPlainSlice + d] = 0;
  }
  pairs.set_queries(tile.first, tile.count);
  const Range keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
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
#pragma unroll 1
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
#pragma unroll 1
    for (int d = lane; d < channels; d += 32) {
      C value = sees ? sums[pairs.row(r) * kPlainSlice + d] / total[r] : C{0};
      if (p.value_conv.data != nullptr) value += depthwise<T>(p, tile, b, h, i, d0 + d);
      at<T>(p.out, b, i, h)[(d0 + d) * p.out.channel] = narrow<T>(value);
    }
  }
}

}  // namespace ck::cuda
