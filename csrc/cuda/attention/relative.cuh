// Tiles of pairs of queries and keys, and what relative terms add to their scores.
//
// Only pairs within the window have columns of their own: a strip of shared memory holds what all terms add to each of
// a warp's 16 positions at each column that the tile reaches. Left and right of the window the terms are one number for
// each query and one for each key.
#pragma once

#include "csrc/cuda/attention/fragments.cuh"

namespace ck::cuda {

// Which side of the pairs a warp has 16 positions of: queries that meet other keys, or keys that meet other queries.
enum class Side { kQueries, kKeys };

// The pairs of a warp's 16 own positions and kOther other ones.
template <Side kOwn, int kOther>
struct PairTile {
  const Attention& p;
  const AttentionTile& tile;
  int own, other;  // the first of each
  int first_query, first_key;

  CK_DEVICE PairTile(const Attention& p, const AttentionTile& tile, int own, int other)
      : p(p),
        tile(tile),
        own(own),
        other(other),
        first_query(kOwn == Side::kQueries ? own : other),
        first_key(kOwn == Side::kQueries ? other : own) {}

  static constexpr int kQueries = kOwn == Side::kQueries ? 16 : kOther, kKeys = kOwn == Side::kQueries ? kOther : 16;

  // The columns that any pair has lie from lowest to highest.
  CK_DEVICE int lowest() const { return tap_of_pair(p, tile, first_query + kQueries - 1, first_key); }
  CK_DEVICE int highest() const { return tap_of_pair(p, tile, first_query, first_key + kKeys - 1); }
  // Of those, the ones that tables have.
  CK_DEVICE Range columns() const { return {max(0, lowest()), min(static_cast<int>(p.window()), highest() + 1)}; }
  // The others that an own position attends to, or that attend to it.
  static CK_DEVICE Range partners(const Attention& p, const AttentionTile& tile, int position) {
    if constexpr (kOwn == Side::kQueries) return visible_keys(p, tile, position);
    const Range none{0, 0};
    return position >= tile.key_begin && position < tile.key_end ? seeing_queries(p, tile, position, position + 1)
                                                                 : none;
  }
  // Whether all pairs attend. `real`: of the keys.
  CK_DEVICE bool seen(unsigned real) const {
    const Range first = partners(p, tile, own);
    const Range last = partners(p, tile, kOwn == Side::kQueries ? min(own + 15, tile.query_end - 1) : own + 15);
    constexpr unsigned kAll = kKeys == 32 ? ~0u : (1u << kKeys % 32) - 1;
    const bool seen = other >= max(first.first, last.first) && other + kOther <= min(first.end, last.end);
    return seen && (real & kAll) == kAll;
  }
  // Whether they lie on one side of the window, if there is one.
  CK_DEVICE bool one_sided() const { return !p.has_columns() || is_left() || lowest() >= p.window(); }
  CK_DEVICE bool far(unsigned real) const { return seen(real) && one_sided(); }
  CK_DEVICE bool is_left() const { return highest() < 0; }
  // The column of the first own position and the first other one. Own row r and other m have column base() + m - r, or,
  // on the side of the keys, base() + r - m.
  CK_DEVICE int base() const { return tap_of_pair(p, tile, first_query, first_key); }
};

// PairTile::far for all tiles of others, found once for kRows own positions: far are the tiles that begin in one of two
// ranges.
template <Side kOwn, int kOther, int kRows>
struct FarTiles {
  Range left, right;

  CK_DEVICE FarTiles(const Attention& p, const AttentionTile& tile, int own) {
    using Pairs = PairTile<kOwn, kOther>;
    constexpr bool kQueries = kOwn == Side::kQueries;
    const Range first = Pairs::partners(p, tile, own);
    const Range last = Pairs::partners(p, tile, kQueries ? min(own + kRows, tile.query_end) - 1 : own + kRows - 1);
    left = {max(first.first, last.first), min(first.end, last.end) - kOther + 1};
    right = left;
    if (!p.has_columns()) return;
    const int W = static_cast<int>(p.window());
    // The other position that has column 0 with the first own one.
    const int zero =
        kQueries ? own + tile.shift - static_cast<int>(p.left) : own - tile.shift + static_cast<int>(p.left);
    if constexpr (kQueries) {
      left.end = min(left.end, zero - kOther + 1);
      right.first = max(right.first, zero + kRows - 1 + W);
    } else {
      left.first = max(left.first, zero + kRows);
      right.end = min(right.end, zero - W - kOther + 2);
    }
  }

  // The same of kPart others from `other` on, a part of a tile. `real`: of the keys, all of which have to be.
  template <int kPart = kOther>
  CK_DEVICE bool has(int other, bool real) const {
    return real && ((other >= left.first && other < left.end + kOther - kPart) ||
                    (other >= right.first && other < right.end + kOther - kPart));
  }
  // Which side those are on.
  template <int kPart = kOther>
  CK_DEVICE bool is_left(int other) const {
    static_assert(kOwn == Side::kQueries);  // what is left of keys comes after them
    return other < left.end + kOther - kPart;
  }
  // Whether all pairs of 16 queries and a part of a tile of keys attend, if the keys are real.
  template <int kPart>
  CK_DEVICE bool sees(int other) const {
    static_assert(kOwn == Side::kQueries);
    return other >= left.first && other < right.end + kOther - kPart;
  }
};

// out[x] += 16 rows, from row n of `rows` on, times a column of a table [terms][window][pitch] (global memory) that
// lane / 4 says: `column`, or for x > 0 the one 8 x after it, the last one at most. rows: PitchedRows, or something
// else with such a function.
template <int kColumns, class T, class Rows>
CK_DEVICE void multiply_table(float (&out)[kColumns][4], const Rows& rows, int n, const T* table, int64_t terms,
                              int64_t W, int64_t pitch, int column, int lane) {
  const T* first[kColumns];
#pragma unroll
  for (int x = 0; x < kColumns; ++x)
    first[x] =
        table + (x == 0 ? column : min(column + 8 * x, static_cast<int>(W) - 1)) * pitch + lane % 4 * kPerWord<T>;
#pragma unroll 1
  for (int k = 0; k < pitch; k += 16) {
    Two<T> a[4];
    rows.load_left(a, n, k, lane);
#pragma unroll 1
    for (int64_t term = 0; term < terms; ++term) {
#pragma unroll
      for (int x = 0; x < kColumns; ++x) {
        const T* const from = first[x] + term * W * pitch + k;
        const Two<T> b[2] = {load_two(from), load_two(from + 8)};
        mma_m16n8k16<T>(out[x], a, b);
      }
    }
  }
}

// The relative terms of a head, for a warp.
template <class T>
struct Relative {
  const Attention& p;
  const TensorTables& t;
  int h, W, lane;
  const float* edges;  // [2][other positions]: what the others add left and right of the window, nullptr: nothing
  float* strip;        // [16][pitch] of shared memory: what all terms add to each of 16 own positions at each column
  int pitch;

  CK_DEVICE Relative(const Attention& p, const TensorTables& t, int64_t h, int lane, const float* edges, float* strip)
      : p(p),
        t(t),
        h(static_cast<int>(h)),
        W(static_cast<int>(p.window())),
        lane(lane),
        edges(edges),
        strip(strip),
        pitch(static_cast<int>(t.strip_pitch)) {}

  // The tables of this head, found anew where they are needed.
  CK_DEVICE const T* query_rel() const {
    return static_cast<const T*>(t.query_rel) +
           (p.query_rel.per_head ? opaque(h) * t.query_terms * p.window() * t.rank_pitch : 0);
  }
  CK_DEVICE const T* key_rel() const {
    return static_cast<const T*>(t.key_rel) +
           (p.key_rel.per_head ? opaque(h) * t.key_terms * p.window() * t.channel_pitch : 0);
  }
  CK_DEVICE const float* bias() const { return t.bias == nullptr ? nullptr : t.bias + opaque(h) * p.window(); }

  // What the query's terms add left and right of the window: to rows lane / 4 and lane / 4 + 8 of 16. rows: of
  // relative_rows(), in shared memory.
  template <class Rows>
  CK_DEVICE void query_edges(float (&left)[2], float (&right)[2], const Rows& rows) const {
    left[0] = left[1] = right[0] = right[1] = 0;
    if (!p.clips() || !p.has_query_columns()) return;
    float sums[1][4] = {}, out[4];
    if (p.query_rel.data != nullptr)
      multiply_table(sums, rows, 0, query_rel(), t.query_terms, W, t.rank_pitch, lane / 4 == 0 ? 0 : W - 1, lane);
    for (int e = 0; e < 4; ++e) out[e] = __shfl_sync(kAllLanes, sums[0][e], lane & ~3) * t.rel_factor;
    const float* const bias = this->bias();
    for (int half = 0; half < 2; ++half) {
      left[half] = out[2 * half] + (bias == nullptr ? 0.0f : bias[0]);
      right[half] = out[2 * half + 1] + (bias == nullptr ? 0.0f : bias[W - 1]);
    }
  }

  // Fills the strip, from column columns.first on, with what the terms of the 16 own positions add: rows. kColumns: how
  // many times 8 columns are found at once.
  template <Side kOwn, int kColumns = 1, class Rows>
  CK_DEVICE void fill_strip(Range columns, const Rows& rows) const {
    const int lane = opaque(this->lane), row = lane / 4, pair = lane % 4 * 2;
    const float* const bias = this->bias();
    __syncwarp();
#pragma unroll 1
    for (int first = columns.first; first < columns.end; first += 8 * kColumns) {
      float out[kColumns][4] = {};
      multiply_columns<kOwn>(out, rows, 0, min(first + row, W - 1), lane);
#pragma unroll
      for (int x = 0; x < kColumns; ++x) {
        if (x > 0 && first + 8 * x >= columns.end) break;
        const int c = first + 8 * x + pair;
        float added[2] = {};
        if (bias != nullptr)
          for (int e = 0; e < 2; ++e) added[e] = bias[min(c + e, W - 1)];
        float* const to = strip + row * pitch + c - columns.first;
        for (int e = 0; e < 4; ++e) to[e / 2 * 8 * pitch + e % 2] = out[x][e] * factor<kOwn>() + added[e % 2];
      }
    }
    __syncwarp();
  }

  // Adds what the terms of the others of the tile add, to a strip that begins at column `first`: their rows.
  template <Side kOwn, int kOther, class Rows>
  CK_DEVICE void add_others(const PairTile<kOwn, kOther>& pairs, Range columns, int first, const Rows& rows) const {
    constexpr bool kQueries = kOwn == Side::kQueries;
    constexpr Side kOthers = kQueries ? Side::kKeys : Side::kQueries;
    if ((kQueries ? p.key_rel : p.query_rel).data == nullptr) return;
    const int lane = opaque(this->lane), row = lane / 4, pair = lane % 4 * 2, base = pairs.base();
#pragma unroll 1
    for (int n = 0; n < kOther; n += 16) {
#pragma unroll 1
      for (int c = columns.first; c < columns.end; c += 8) {
        const int nearest = kQueries ? base + n - c : c - base + n;  // own position of the first of both
        if (kQueries ? nearest + 15 < 0 || nearest - 7 > 15 : nearest + 22 < 0 || nearest > 15) continue;
        float out[1][4] = {};
        multiply_columns<kOthers>(out, rows, n, min(c + row, W - 1), lane);
        for (int e = 0; e < 4; ++e) {
          const int by = pair + e % 2, m = row + e / 2 * 8, own = kQueries ? nearest + m - by : nearest + m + by;
          if (own >= 0 && own < 16 && c + by < columns.end)
            strip[own * pitch + c + by - first] += out[0][e] * factor<kOthers>();
        }
      }
    }
    __syncwarp();
  }

 private:
  // out += 16 rows of queries, or keys, from row n on, times columns of their table.
  template <Side kSide, int kColumns, class Rows>
  CK_DEVICE void multiply_columns(float (&out)[kColumns][4], const Rows& rows, int n, int column, int lane) const {
    if constexpr (kSide == Side::kQueries) {
      if (p.query_rel.data != nullptr)
        multiply_table(out, rows, n, query_rel(), t.query_terms, W, t.rank_pitch, column, lane);
    } else {
      if (p.key_rel.data != nullptr)
        multiply_table(out, rows, n, key_rel(), t.key_terms, W, t.channel_pitch, column, lane);
    }
  }
  template <Side kSide>
  CK_DEVICE float factor() const {
    return kSide == Side::kQueries ? t.rel_factor : t.score_factor;
  }
};

}  // namespace ck::cuda
