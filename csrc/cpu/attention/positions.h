// Where queries stand among the keys, and which keys each may see.
#pragma once

#include "csrc/cpu/attention/problem.h"
#include "csrc/cpu/simd.h"

namespace ck::cpu::CK_ISA {

// Keys that one query may see, or taps that it may read.
struct Range {
  int64_t first, end;

  bool empty() const { return first >= end; }
};

// One query as seen from the keys.
struct QueryPosition {
  int64_t at;      // its position among the keys
  Range sequence;  // the keys of its sequence
  Range visible;   // those it attends to, padding aside

  // Taps of the depthwise term whose values exist.
  Range taps(const Attention& p) const {
    const int64_t start = at - p.left;
    return {max(0, sequence.first - start), min(p.causal ? p.left + 1 : p.window(), sequence.end - start)};
  }
};

constexpr int64_t kFewQueries = 4;    // are not worth panels of the keys: decoding
constexpr int64_t kQueryRows = 96;    // queries that are worked on together
constexpr int64_t kKeyColumns = 256;  // and keys
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;  // keys of a panel, [channels][kPanel]

// Distance of rows of so many elements: an odd number of cache lines, so that a column of rows does not crowd into few
// sets of the first cache.
template <class C>
constexpr int64_t row_pitch(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(C);
  return ((width + kLine - 1) / kLine | 1) * kLine;
}
template <class C>
constexpr int64_t kScorePitch = row_pitch<C>(kKeyColumns);

class QueryPositions {
 public:
  explicit QueryPositions(const AttentionProblem& p) : positions_(p.queries), ranges_(ceil_div(p.queries, kQueryRows)) {
    int64_t sequence = 0;
    for (int64_t i = 0; i < p.queries; ++i) {
      QueryPosition& position = positions_[i];
      if (p.query_offsets == nullptr) {
        position = {i + p.keys - p.queries, {0, p.keys}, {}};
      } else {
        while (p.query_offsets[sequence + 1] <= i) ++sequence;
        const int64_t* const keys = p.key_offsets + sequence;
        position = {i + keys[1] - p.query_offsets[sequence + 1], {keys[0], keys[1]}, {}};
      }
      Range& visible = position.visible = position.sequence;
      if (p.causal) visible.end = min(visible.end, position.at + 1);
      if (p.outside == Outside::kMask) {
        visible.first = max(visible.first, position.at - p.left);
        visible.end = min(visible.end, position.at + p.right + 1);
      }
      Range& all = ranges_[i / kQueryRows];
      if (i % kQueryRows == 0) all = {p.keys, 0};
      if (visible.empty()) continue;
      all = {min(all.first, visible.first), max(all.end, visible.end)};
      leave_ = leave_ || visible.first < position.at - p.left || visible.end > position.at + p.right + 1;
      max_seen_ = max(max_seen_, all.end - all.first);
    }
  }

  const QueryPosition* of(int64_t i) const { return positions_.get() + i; }
  // The keys that some query of a block sees.
  Range seen_by(int64_t block) const { return ranges_[block]; }
  int64_t max_seen() const { return max_seen_; }
  bool leave_window() const { return leave_; }  // some query sees keys outside its window

 private:
  Scratch<QueryPosition> positions_;
  Scratch<Range> ranges_;
  int64_t max_seen_ = 0;
  bool leave_ = false;
};

}  // namespace ck::cpu::CK_ISA
