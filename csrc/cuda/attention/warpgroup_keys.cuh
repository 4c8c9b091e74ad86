// What a block of keys has besides its tiles, in the backward pass by warpgroups.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/warpgroup_tiles.cuh"

namespace ck::cuda {

// What stands beside a tile of kQueries queries in shared memory.
template <int kQueries>
struct QueryScalars {
  float lse[kQueries], delta[kQueries], edges[2][kQueries];  // times log2(e), but for delta
};

// A tile of keys and the queries that see some of them, in shared memory, where they take no registers.
struct KeyTile {
  AttentionTile tile;
  int b, g, part;  // where it belongs to
  Range queries;

  CK_DEVICE KeyTile(const Attention& p, int n, int b, int g, int part)
      : tile(p, n, kWarpgroupRows, true, true),
        b(b),
        g(g),
        part(part),
        queries(tile.count <= 0 ? Range{0, 0}
                                : seeing_queries(p, tile, max(tile.first, tile.key_begin), tile.first + tile.count)) {}
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
    // A query that sees nothing has no probabilities.
    to.lse[x] = lse == -infinity<float>() ? infinity<float>() : lse * kLog2e;
    to.delta[x] = there && p.needs_keys() ? static_cast<const float*>(p.delta)[unit * p.queries + i] : 0.0f;
    for (int side = 0; side < 2; ++side)
      to.edges[side][x] = there && t.query_edges != nullptr ? t.query_edges[(unit * 2 + side) * p.queries + i] : 0.0f;
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
