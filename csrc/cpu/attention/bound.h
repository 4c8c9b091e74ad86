// Which rows of scores need no maximum subtracted before their exponentials are taken: those whose scores cannot be
// large, by the lengths of the vectors whose products they are.
#pragma once

#include "csrc/cpu/attention/block.h"

namespace ck::cpu::CK_ISA {

// How large scores to base 2 may be for that. Their exponentials and the sums of these are far from the ends of
// float32; sums of their products with values get there only if the values are huge or tiny.
constexpr double kDirectScores = 60;
// Sums of products below the first may have lost bits; they have not if all values but 0 are at least the second.
constexpr double kTinySum = 0x1p-100, kTinyValue = 0x1p-40;

template <class C>
class ScoreBound {
 public:
  ScoreBound(const Keys<C>& keys, const QueryBlock<C>& block)
      : keys_(keys),
        block_(block),
        known_(keys.k.has_lengths() || (!keys.d.p.qk && keys.d.p.key_rel.data == nullptr)) {}

  // Looks at the tables of head keys.head.
  void choose_head() {
    if (head_ == keys_.head || !known_) return;
    head_ = keys_.head;
    bias_ = keys_.tables.bias.longest_column();
    query_rel_ = keys_.tables.query_rel.longest_column();
    // The table of keys carries the factor of the scores, and so do the lengths of keys.
    key_rel_ = keys_.d.p.key_rel.data == nullptr
                   ? C{0}
                   : keys_.tables.key_rel.longest_column() / static_cast<C>(::fabs(keys_.d.score_scale()));
  }

  // direct[r]: scores of row r of the block are at most kDirectScores on either side of 0. The row itself decides,
  // with the keys it sees.
  void find(bool* direct) {
    const AttentionData<C>& d = keys_.d;
    const int64_t rows = block_.rows();
    const bool two = d.p.rel_query.data != nullptr;
    memset(direct, 0, static_cast<size_t>(rows));
    if (!known_) return;
    alignas(64) C q[kQueryRows], r[kQueryRows];
    squared_lengths(block_.q(), rows, d.pitch, d.width, q);
    if (two) squared_lengths(block_.r(), rows, d.rank_pitch, round_up(d.p.rank, kLanes<C>), r);
    for (int64_t i = 0; i < rows; ++i) {
      const C key = d.p.qk || d.p.key_rel.data != nullptr ? longest(block_.position(i).visible) : C{0};
      const C room = static_cast<C>(kDirectScores) - bias_ - key * key_rel_;
      // |q| |k| + |r| |c| is the product of (|q|, |r|) and (|k|, |c|), and so at most that of their lengths.
      const C size =
          two ? (q[i] + r[i]) * (key * key + query_rel_ * query_rel_) : q[i] * (key + query_rel_) * (key + query_rel_);
      direct[i] = room > 0 && size <= room * room;
    }
  }

 private:
  // The greatest length of these keys; that of ranges that grow is found step by step.
  C longest(const Range& keys) {
    if (keys_.group != group_ || keys_.batch != batch_ || keys.first != measured_.first || keys.end < measured_.end) {
      group_ = keys_.group;
      batch_ = keys_.batch;
      measured_ = {keys.first, keys.first};
      squared_ = longest_ = 0;
    }
    if (keys.end > measured_.end) {
      const C squared = largest_of(keys_.k.squared_lengths_from(measured_.end), keys.end - measured_.end);
      measured_.end = keys.end;
      if (squared > squared_) {
        squared_ = squared;
        longest_ = static_cast<C>(::sqrt(squared));
      }
    }
    return longest_;
  }

  const Keys<C>& keys_;
  const QueryBlock<C>& block_;
  const bool known_;
  int64_t head_ = -1, group_ = -1, batch_ = -1;
  Range measured_{0, 0};
  C squared_ = 0, longest_ = 0, bias_ = 0, query_rel_ = 0, key_rel_ = 0;
};

}  // namespace ck::cpu::CK_ISA
