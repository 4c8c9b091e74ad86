// Scores of a tile of pairs, for the forward pass, the pass over queries and the pass over keys.
//
// What is hidden contributes nothing, even if it holds NaN or infinity. Scores and their gradients are selected, in
// tiles where not every pair is seen. A product of such a tile with rows that are not finite spoils sums of pairs that
// are not seen, which shows when the sums are finished: then the walk over the tiles is made again, with zeros in place
// of those numbers (multiply_rows), and they are added at the end, pair by pair (add_spoiled).
#pragma once

#include "csrc/cuda/attention/relative.cuh"

namespace ck::cuda {

// A lane's pairs of 16 own positions and 32 others, as bits.
constexpr uint32_t kEveryPair = 0xFFFFu;

// Turns raw products into scores times log2(e), pair by pair; pairs that do not attend get -inf. rel.strip begins at
// column `strip_first`. Returns which attend, bit 4 n + e for element e of fragment n.
template <class T, Side kOwn, int kOther>
CK_DEVICE uint32_t score_pairs(float (&s)[kOther / 8][4], const Relative<T>& rel, const PairTile<kOwn, kOther>& pairs,
                               unsigned real, const float (&left)[2], const float (&right)[2], int strip_first) {
  constexpr bool kQueries = kOwn == Side::kQueries;
  const Attention& p = rel.p;
  const int lane = opaque(rel.lane), row = lane / 4, pair = lane % 4 * 2, W = rel.W;
  const int positions = static_cast<int>(kQueries ? p.keys : p.queries);
  const bool columns = p.has_columns();
  Range partners[2];
  const int own = opaque(pairs.own);
  uint32_t seen = 0;
  for (int half = 0; half < 2; ++half) partners[half] = pairs.partners(p, pairs.tile, own + row + 8 * half);
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n) {
    const PairTile<kOwn, 8> fragment(p, pairs.tile, own, pairs.other + 8 * n);
    const int base = fragment.base();
    // Fragments left or right of the window need no column for each pair.
    const bool all_left = fragment.highest() < 0, all_right = fragment.lowest() >= W;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, col = pair + e % 2, other = fragment.other + col, r = row + 8 * half;
      float value = s[n][e] * rel.t.score_factor;
      if (columns) {
        const int c = kQueries ? base + col - r : base + r - col;
        const bool is_left = all_left || c < 0, is_right = all_right || c >= W;
        value += is_left ? left[half] : is_right ? right[half] : rel.strip[r * rel.pitch + c - strip_first];
        if (rel.edges != nullptr && (is_left || is_right) && other >= 0 && other < positions)
          value += rel.edges[(is_left ? 0 : positions) + other];
      }
      const bool there = (real >> (kQueries ? 8 * n + col : r) & 1u) != 0;
      const bool sees = there && other >= partners[half].first && other < partners[half].end;
      s[n][e] = sees ? value : -infinity<float>();
      seen |= uint32_t{sees} << (4 * n + e);
    }
  }
  return seen;
}

// How the products s of a tile of pairs become scores: a score times log2(e) is s * factor + added[half]; half 0 is row
// lane / 4 and half 1 the eighth after it.
struct ScoreTerms {
  float factor, added[2];
  int side;       // of the window, where all pairs are on one: 0 left, 1 right; otherwise -1
  uint32_t seen;  // the pairs that attend
};

// Where all pairs attend and lie on one side of the window (PairTile::far), nothing is done pair by pair: what the own
// positions add there, `left` or `right`, is constant. side: -1 where there is no window. What the others add
// (rel.edges) is left to the caller.
CK_DEVICE ScoreTerms far_scores(const TensorTables& t, int side, const float (&left)[2], const float (&right)[2]) {
  ScoreTerms terms{t.score_factor, {}, side, kEveryPair};
  for (int half = 0; half < 2; ++half) terms.added[half] = side == 0 ? left[half] : right[half];
  return terms;
}

// Everywhere else s becomes scores. real: the keys that the mask leaves; the rows of both sides, in shared memory, are
// those that tables are multiplied with.
template <class T, Side kOwn, int kOther, class OwnRows, class OtherRows>
CK_DEVICE ScoreTerms near_scores(float (&s)[kOther / 8][4], const Relative<T>& rel, const PairTile<kOwn, kOther>& pairs,
                                 unsigned real, const float (&left)[2], const float (&right)[2],
                                 const OwnRows& own_rows, const OtherRows& other_rows) {
  Range columns{0, 0};
  if (rel.p.has_columns()) {
    columns = pairs.columns();
    rel.template fill_strip<kOwn>(columns, own_rows);
    rel.add_others(pairs, columns, columns.first, other_rows);
  }
  return {1, {}, -1, score_pairs(s, rel, pairs, real, left, right, columns.first)};
}

// Zeros for the pairs that do not attend.
template <int kX>
CK_DEVICE void select_seen(float (&values)[kX][4], uint32_t seen) {
  static_assert(kX == 4);
  if (seen == kEveryPair) return;
#pragma unroll
  for (int n = 0; n < kX; ++n)
    for (int e = 0; e < 4; ++e) values[n][e] = (seen >> (4 * n + e) & 1u) != 0 ? values[n][e] : 0.0f;
}

// Bit 4 n + e: whether dropout keeps element e of fragment n, of kOther / 8. Blocks of keys begin at multiples of 4.
template <Side kOwn, int kOther>
CK_DEVICE uint32_t draw_fragments(const Attention& p, uint64_t seed, int64_t b, int64_t h,
                                  const PairTile<kOwn, kOther>& pairs, int lane) {
  static_assert(kOther <= 64 / 2);
  uint32_t kept = 0;
  lane = opaque(lane);
#pragma unroll 1
  for (int n = 0; n < kOther / 8; ++n) {
    const int other = pairs.other + 8 * n;
    uint32_t mine[4];
    if constexpr (kOwn == Side::kQueries) {
      // Two lanes have the keys of one draw, in the same two rows: each draws for one of the rows.
      const bool odd = (lane & 1) != 0;
      const PhiloxBlock words = pair_words(seed, b, h, pairs.own + lane / 4 + (odd ? 8 : 0), other / 4 + lane % 4 / 2);
      const uint32_t low = __shfl_xor_sync(kAllLanes, odd ? words.word[0] : words.word[2], 1);
      const uint32_t high = __shfl_xor_sync(kAllLanes, odd ? words.word[1] : words.word[3], 1);
      mine[0] = odd ? low : words.word[0], mine[1] = odd ? high : words.word[1];
      mine[2] = odd ? words.word[2] : low, mine[3] = odd ? words.word[3] : high;
    } else {
      // Four lanes have the keys of one draw: each draws for one row of keys and one query.
      const int which = lane / 4 % 4;  // bit 0: the query, bit 1: the half of the keys
      const PhiloxBlock words =
          pair_words(seed, b, h, other + lane % 4 * 2 + which % 2, (pairs.own + lane / 16 * 4 + which / 2 * 8) / 4);
      uint32_t got[4];  // [x]: drawn by the lane whose number differs by x
#pragma unroll
      for (int x = 0; x < 4; ++x) got[x] = __shfl_xor_sync(kAllLanes, select_word(words.word, which ^ x), x * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[e] = select_word(got, e ^ which);
    }
    for (int e = 0; e < 4; ++e) kept |= uint32_t{mine[e] >= p.drop_below} << (4 * n + e);
  }
  return kept;
}

}  // namespace ck::cuda
