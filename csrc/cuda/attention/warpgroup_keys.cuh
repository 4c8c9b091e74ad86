// What a block of keys has besides its tiles, in the backward pass by warpgroups.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/warpgroup_strips.cuh"

namespace ck::cuda {

// What stands beside a tile of kQueries queries in shared memory.
template <int kQueries>
struct QueryScalars {
  // What is added to scores, times log2(e): -lse, and what the query's terms add left (0) and right (2) of the window.
  // -inf: a query that sees nothing has no probabilities.
  float added[3][kQueries], delta[kQueries];

  // Of a lane's queries of a fragment, the 8 from n on.
  CK_DEVICE float2 added_at(int side, int n, int lane) const { return pair_of(added[side] + n, lane); }
  CK_DEVICE float2 delta_at(int n, int lane) const { return pair_of(delta + n, lane); }
  CK_DEVICE bool is_blind(int n) const { return added[1][n] == -infinity<float>(); }

 private:
  CK_DEVICE static float2 pair_of(const float* numbers, int lane) {
    float2 both;
    both = *reinterpret_cast<const float2*>(numbers + lane % 4 * 2);
    return both;
  }
};

// The first queries of the tiles of 32 that are far (FarTiles) from a warp's 16 keys.
struct alignas(16) FarRanges {
  Range left, right;
};

// A tile of keys and the queries that see some of them, in shared memory, where they take no registers.
struct KeyTile {
  AttentionTile tile;
  int b, g, part;  // where it belongs to
  Range queries;
  Range all_see;  // of them, those that see all keys
  FarRanges far;

  CK_DEVICE KeyTile(const Attention& p, int n, int b, int g, int part)
      : tile(p, n, kWarpgroupRows, true, true),
        b(b),
        g(g),
        part(part),
        queries(tile.count <= 0 ? Range{0, 0}
                                : seeing_queries(p, tile, max(tile.first, tile.key_begin), tile.first + tile.count)),
        all_see{0, 0},
        far{{0, 0}, {0, 0}} {}

  // For a warp with the keys from j0 on, of which the mask leaves `real`.
  CK_DEVICE void find_far(const Attention& p, int j0, unsigned real) {
    const int begin = max(tile.first, tile.key_begin);
    const Range first = seeing_queries(p, tile, begin, begin + 1),
                last = seeing_queries(p, tile, tile.end() - 1, tile.end());
    all_see = {max(first.first, last.first), min(first.end, last.end)};
    if ((real & 0xFFFFu) != 0xFFFFu) return;
    const FarTiles<Side::kKeys, 32, 16> found(p, tile, j0);
    far = {found.left, found.right};
  }
};

// Products of a warp's 16 keys that are added to d(k).
template <int D>
struct KeySums {
  float (&registers)[D / 8][4];

  CK_DEVICE float factor() const { return 1; }
  template <class Product>
  CK_DEVICE void add(int64_t size, int, const Product& product) const {
    add_to_registers<D>(registers, size, product);
  }
};

// Scores of a warp's 16 keys and 32 queries, from products s, and -lse of the queries added, where the window crosses
// the tile. first: with the first 16 queries; at: the first one's place in `scalars`; key_edge(side, half): what
// key_rel adds beside the window; the rows of both in shared memory are those that tables are multiplied with.
template <class T, int kQueries, class KeyEdge>
CK_DEVICE void near_scores_of_keys(float (&s)[4][4], const Relative<T>& rel, const PairTile<Side::kQueries, 16>& first,
                                   const QueryScalars<kQueries>& scalars, int at, const KeyEdge& key_edge,
                                   const TileRows& key_rows, const TileRows& query_rows) {
  using Strip = PairStrip<16>;
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const PairTile<Side::kQueries, 16> pairs(first.p, first.tile, first.own + 16 * y, first.other);
    const Strip strip{rel.strip, pairs.lowest()};
    const TileRows rows{query_rows.at(16 * y, 0), query_rows.panel, query_rows.pitch};
    strip.fill(rel, rows,
               [&](int side, int half) { return scalars.added[side][at + 16 * y + 8 * half + rel.lane / 4]; });
    rel.add_others(pairs, pairs.columns(), strip.lowest, key_rows);
    const int lane = opaque(rel.lane);  // so that the place takes no register before
    const float* const mine = rel.strip + Strip::place(lane % 4 * 2, lane / 4);
#pragma unroll
    for (int x = 0; x < 2; ++x)
      for (int e = 0; e < 4; ++e) {
        float& value = s[2 * y + x][e];
        value = value * rel.t.score_factor + mine[Strip::place(8 * x + e % 2, e / 2 * 8) - 15];
      }
  }
  if (rel.t.key_edges == nullptr) return;
  const int column = first.base() + rel.lane / 4 - rel.lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float left = key_edge(0, half), right = key_edge(1, half);
#pragma unroll
    for (int x = 0; x < 4; ++x)
      for (int e = 0; e < 2; ++e) {
        const int c = column + 8 * half - 8 * x - e;
        s[x][2 * half + e] += c < 0 ? left : c >= rel.W ? right : 0.0f;
      }
  }
}

// From one tile of queries to the next one, which may be of the next head.
template <int kQueries>
CK_DEVICE void next_queries(const Range& queries, int& h, int& i0) {
  if ((i0 += kQueries) >= queries.end) i0 = queries.first, ++h;
}

// By a warp: scalars of the queries from i0 on, and their rows of rel_query, `pitch` bytes apart.
template <class T, int kQueries>
CK_DEVICE void load_scalars(QueryScalars<kQueries>& to, char* rows, int pitch, const AttentionBackward& p,
                            const TensorTables& t, int b, int h, int i0, const Range& queries, int lane) {
  const int64_t unit = int64_t{b} * p.heads + h;
#pragma unroll 1
  for (int x = lane; x < kQueries; x += 32) {
    const int i = i0 + x;
    const bool there = i < queries.end;
    const float lse = there ? at<float>(p.lse, b, h, i) : -infinity<float>();
    const float none = lse == -infinity<float>() ? lse : -lse * kLog2e;
    to.added[1][x] = none;
    for (int side = 0; side < 2; ++side)
      to.added[2 * side][x] =
          (there && t.query_edges != nullptr ? t.query_edges[(unit * 2 + side) * p.queries + i] : 0.0f) + none;
    to.delta[x] = there && p.needs_keys() ? static_cast<const float*>(p.delta)[unit * p.queries + i] : 0.0f;
  }
  if (pitch == 0) return;
  const int rank = static_cast<int>(p.rank), pieces = static_cast<int>(t.rank_pitch) / 8;
#pragma unroll 1
  for (int n = lane; n < kQueries * pieces; n += 32) {
    const int x = n / pieces, d = n % pieces * 8, i = i0 + x;
    float value[8] = {};
    if (i < queries.end && d < rank)
      load_channels(value, at<T>(p.rel_query, b, i, h) + d * p.rel_query.channel, p.rel_query.channel, rank - d,
                    t.rank_vectors);
    store_channels(reinterpret_cast<T*>(rows + x * pitch) + d, 1, 8, true, value);
  }
}

}  // namespace ck::cuda
