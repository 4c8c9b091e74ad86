// Scores of a block of queries and a block of keys: what the forward pass and both halves of the backward pass share.
#pragma once

#include "csrc/cpu/attention/dropout.h"
#include "csrc/cpu/attention/pack.h"

namespace ck::cpu::CK_ISA {

// The keys of a block that one query sees, and those of them within its window; positions within the block.
struct RowSpan {
  int64_t first, window_first, window_end, end;
};

// Constants that a row of scores still lacks: `left` before `begin`, `right` from `end` on, both at whole vectors. They
// are added within the argument of the exponential.
template <class C>
struct PendingBias {
  int64_t begin, end;
  C left, right;
};

template <class C, class Body>
CK_INLINE void each_span(const PendingBias<C>& pending, int64_t n, const Body& body) {
  body(int64_t{0}, pending.begin, pending.left);
  body(pending.begin, pending.end, C{0});
  body(pending.end, n, pending.right);
}

// The maximum of a row.
template <class C>
CK_INLINE C largest(const C* s, int64_t n, const PendingBias<C>& pending) {
  constexpr int V = kLanes<C>;
  Vec<C> top = splat(static_cast<C>(-__builtin_inf()));
  each_span(pending, n, [&](int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    for (int64_t j = from; j < to; j += V) top = vmax<C>(top, load_bytes<Vec<C>>(s + j) + constant);
  });
  return max_lanes<C>(top);
}

// What is subtracted from scores: their maximum, or 0 for a row without keys, whose scores are all -inf.
template <class C>
CK_INLINE C shift_of(C top) {
  return top == static_cast<C>(-__builtin_inf()) ? C{0} : top;
}

// s = 2^(s - shift), where shift is no less than s but for rounding, and the sum of the row. Of scores from 2^30 on the
// rounding is more than exponents reach, so that results are held at 2.
template <class C>
CK_INLINE C exponentials(C* s, int64_t n, const PendingBias<C>& pending, C shift) {
  constexpr int V = kLanes<C>;
  Vec<C> sum = {};
  each_span(pending, n, [&](int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    for (int64_t j = from; j < to; j += V) {
      const Vec<C> x = load_bytes<Vec<C>>(s + j) + constant - shift, most = splat(C{1});
      const Vec<C> e = vexp2<C>(most < x ? most : x);
      store_bytes(s + j, e);
      sum += e;
    }
  });
  return sum_lanes<C>(sum);
}

// s = 2^s for scores that are not large. Returns `sum` with the row added, lane by lane.
template <class C>
CK_INLINE Vec<C> direct_exponentials(C* s, int64_t n, const PendingBias<C>& pending, Vec<C> sum) {
  constexpr int V = kLanes<C>;
  Vec<C> odd = {};
  each_span(pending, n, [&](int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    const auto take = [&](int64_t j, Vec<C>& total) CK_INLINE_LAMBDA {
      const Vec<C> e = vexp2_bounded<C>(load_bytes<Vec<C>>(s + j) + constant);
      store_bytes(s + j, e);
      total += e;
    };
    int64_t j = from;
    for (; j + V < to; j += 2 * V) {
      take(j, sum);
      take(j + V, odd);
    }
    if (j < to) take(j, sum);
  });
  return sum + odd;
}

// How the work of each group of heads in each batch row is split into tasks, by its blocks of queries. Where tasks have
// sums of their own, the problem alone decides, so that results are the same bits on any number of threads.
struct Splits {
  // tasks: as many as would do. min_blocks: of a split, to be worth packing the keys again.
  Splits(int64_t group_count, int64_t block_count, int64_t tasks, int64_t min_blocks)
      : groups(group_count),
        blocks(block_count),
        per_group(groups == 0 ? 0 : max(1, min(blocks / min_blocks, ceil_div(tasks, groups)))) {}

  int64_t tasks() const { return groups * per_group; }
  Range of(int64_t task) const {
    const int64_t split = task % per_group;
    return {blocks * split / per_group, blocks * (split + 1) / per_group};
  }

  int64_t groups, blocks, per_group;
};

// Queries whose terms are computed together for a block of keys, and the columns that they need there. The first of
// these begins a vector.
constexpr int64_t kBandRows = 2 * kTileRows;
template <class C>
constexpr int64_t kBandColumns = kKeyColumns + kBandRows + kLanes<C>;

// Keys whose terms are computed together, and the distance of their rows: the columns that a block of queries needs.
constexpr int64_t kNearKeys = 16;
template <class C>
constexpr int64_t kNearPitch = row_pitch<C>(kQueryRows + kNearKeys + 2 * kLanes<C>);

// Up to kQueryRows queries of one head.
template <class C>
class QueryBlock {
 public:
  static constexpr int V = kLanes<C>;
  static constexpr int64_t kStrip = 2 * V;
  static constexpr int64_t kAhead = 16;  // rows, of what is asked for

  QueryBlock(const AttentionData<C>& data, const Keys<C>& keys)
      : d_(data),
        p_(data.p),
        keys_(keys),
        q_(kQueryRows * data.pitch),
        r_(p_.rel_query.data != nullptr ? kQueryRows * data.rank_pitch : 0),
        whole_(p_.window() <= kBandColumns<C>),
        strip_pitch_(row_pitch<C>(min(p_.window(), kBandColumns<C>))),
        strip_(p_.query_rel.data != nullptr ? kQueryRows * strip_pitch_ : 0),
        near_(p_.key_rel.data != nullptr ? kNearKeys * kNearPitch<C> : 0) {}

  // Loads query block `block` of head keys.head.
  void load(int64_t block) {
    first_ = block * kQueryRows;
    rows_ = min(kQueryRows, p_.queries - first_);
    seen_ = d_.positions.seen_by(block);
    read(p_.q, p_.channels, q_.get(), d_.pitch);
    if (p_.rel_query.data != nullptr) read(p_.rel_query, p_.rank, r_.get(), d_.rank_pitch);
    if (p_.query_rel.data != nullptr && whole_) multiply_columns({0, rows_}, {0, p_.window()});
    if (d_.clips) {
      find_edges(0, left_);
      find_edges(p_.window() - 1, right_);
    }
  }

  // The block's rows of a tensor.
  void read(const HeadRows& source, int64_t n, C* to, int64_t pitch) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (r + kAhead < rows_) prefetch_row(p_, source, batch(), query(r + kAhead), head(), n);
      read_row<C>(p_, source, batch(), query(r), head(), n, 1, to + r * pitch);
    }
  }

  int64_t batch() const { return keys_.batch; }
  int64_t head() const { return keys_.head; }
  int64_t query(int64_t r) const { return first_ + r; }
  int64_t rows() const { return rows_; }
  int64_t first_key() const { return seen_.first / kPanel<C> * kPanel<C>; }  // of those that each_key_block visits
  const QueryPosition& position(int64_t r) const { return d_.positions.of(first_)[r]; }
  const C* q() const { return q_.get(); }
  const C* r() const { return p_.rel_query.data != nullptr ? r_.get() : q_.get(); }  // the factor of query_rel

  // Calls body(first, n) for the blocks of keys that some query sees.
  template <class Body>
  void each_key_block(const Body& body) const {
    const int64_t end = min(d_.padded, round_up(seen_.end, kPanel<C>));
    for (int64_t j = first_key(); j < end; j += kKeyColumns) body(j, min(kKeyColumns, end - j));
  }

  // Columns of the tables that a query may meet.
  Range columns(int64_t r) const {
    const QueryPosition& at = position(r);
    if (at.visible.empty()) return {0, 0};
    const auto within = [&](int64_t j) { return max(0, min(column(r, j), p_.window() - 1)); };
    return {within(at.visible.first), within(at.visible.end - 1) + 1};
  }

  // Calls body(column, n, rows) for strips of columns and the rows between the first and the last that need them.
  template <class Body>
  void each_strip(const Body& body) const {
    Range overlap[kQueryRows], all{p_.window(), 0};
    for (int64_t r = 0; r < rows_; ++r) {
      overlap[r] = columns(r);
      if (!overlap[r].empty()) all = {min(all.first, overlap[r].first), max(all.end, overlap[r].end)};
    }
    for (int64_t c = all.first / kStrip * kStrip; c < all.end; c += kStrip) {
      const auto overlaps = [&](int64_t r) { return overlap[r].first < c + kStrip && overlap[r].end > c; };
      Range rows{0, rows_};
      while (!rows.empty() && !overlaps(rows.first)) ++rows.first;
      while (!rows.empty() && !overlaps(rows.end - 1)) --rows.end;
      if (!rows.empty()) body(c, min(kStrip, round_up(p_.window() - c, V)), rows);
    }
  }

  // Calls body(from, to) for queries that follow each other in one sequence.
  template <class Body>
  void each_run(const Body& body) const {
    for (int64_t r = 0, end; r < rows_; r = end) {
      end = r + 1;
      // A sequence without keys begins where the next one does.
      const Range& sequence = position(r).sequence;
      while (end < rows_ && position(end).at == position(end - 1).at + 1 &&
             position(end).sequence.first == sequence.first && position(end).sequence.end == sequence.end)
        ++end;
      body(r, end);
    }
  }

  // Calls body(key, n, rows, low, overlap) for kNearKeys of the n keys from `first` on at a time and the rows of a run
  // within whose windows some are. In the tables of keys, row r and key j have column position(r).at - j + p.right.
  // low: the least of these, at a whole vector, perhaps left of the table; overlap: those within the table, at whole
  // vectors.
  template <class Body>
  void each_near(int64_t from, int64_t to, int64_t first, int64_t n, const Body& body) const {
    const Range& sequence = position(from).sequence;
    const int64_t at = position(from).at, right = p_.causal ? 0 : p_.right;
    for (int64_t key = first; key < first + n; key += kNearKeys) {
      const int64_t count = min(kNearKeys, first + n - key), last = key + count - 1;
      const Range rows{from + max(0, key - right - at), from + min(to - from, last + p_.left + 1 - at)};
      if (rows.empty() || last < sequence.first || key >= sequence.end) continue;
      const int64_t min_column = position(rows.first).at - last + p_.right;
      const int64_t low = min_column >= 0 ? min_column / V * V : -round_up(-min_column, V);
      const int64_t end = min(p_.window(), position(rows.end - 1).at - key + p_.right + 1);
      body(key, count, rows, low, Range{max(0, low), round_up(end, V)});
    }
  }

  // Calls body(r, j, near) for squares of V rows from r on and V keys from j on; near: where, in rows of columns from
  // `low` on, row r and key j have their column. The next row is to the right of it, the next key below it and one to
  // the left.
  template <class Body>
  CK_INLINE void each_square(int64_t key, int64_t n, Range rows, int64_t low, const Body& body) const {
    for (int64_t r = rows.first; r < rows.end; r += V)
      for (int64_t j = key; j < key + n; j += V)
        body(r, j, (j - key) * kNearPitch<C> + position(r).at - j + p_.right - low);
  }

  // What is zero outside the window of a row; the vector begins at key j of the block of keys.
  CK_INLINE Vec<C> within(const RowSpan& c, int64_t j, Vec<C> v) const {
    if (c.window_first <= j && j + V <= c.window_end) return v;
    return select_lanes<C>(c.window_first - j, c.window_end - j, v, Vec<C>{});
  }

  // Products of queries and keys, and what the relative terms add within the windows, in rows of kScorePitch.
  void multiply_keys(int64_t first, int64_t n, C* s) const {
    if (p_.qk)
      keys_.k.dot_rows(first, n, rows_, q_.get(), s);
    else
      clear(s, rows_ * kScorePitch<C>);
    if (!p_.has_columns()) return;
    RowSpan spans[kQueryRows];
    for (int64_t r = 0; r < rows_; ++r) spans[r] = span(r, first, n);
    each_run([&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to && p_.has_query_columns(); r += kBandRows)
        add_band(r, min(to, r + kBandRows), first, spans, s);
      if (p_.key_rel.data != nullptr) add_near(from, to, first, n, spans, s);
    });
  }

  // Dropout's multipliers of a row of weights.
  void draw_keep(int64_t r, int64_t first, int64_t n, C* keep) const {
    draw(p_, batch(), head(), query(r), first, n, keep);
  }
  // Multiplies a row of weights by them. keep: scratch for n of them.
  void drop(int64_t r, int64_t first, int64_t n, C* row, C* keep) const {
    draw_keep(r, first, n, keep);
    for (int64_t j = 0; j < n; j += V) store_bytes(row + j, load_bytes<Vec<C>>(row + j) * load_bytes<Vec<C>>(keep + j));
  }

  RowSpan span(int64_t r, int64_t first, int64_t n) const {
    const QueryPosition& at = position(r);
    const auto within = [&](int64_t j, int64_t low) { return max(low, min(j - first, n)); };
    RowSpan c;
    c.first = within(at.visible.first, 0);
    c.end = within(at.visible.end, c.first);
    c.window_first = min(within(at.at - p_.left, c.first), c.end);
    c.window_end = min(within(at.at + p_.right + 1, c.window_first), c.end);
    return c;
  }

  bool sees(int64_t r, int64_t j) const { return position(r).visible.first <= j && j < position(r).visible.end; }

  // The column of the tables that belongs to position j.
  int64_t column(int64_t r, int64_t j) const { return j - position(r).at + p_.left; }

  // Adds the terms that are constant outside the window to a row of products, and sets hidden keys to -inf. Returns the
  // constants that are not added yet. The row of a query without keys may hold anything before.
  PendingBias<C> finish(int64_t r, const RowSpan& c, int64_t first, int64_t n, C* s) const {
    const C none = static_cast<C>(-__builtin_inf());
    PendingBias<C> pending{0, 0, 0, 0};
    if (c.first == c.end || !d_.sees_something(batch(), position(r).visible)) {
      for (int64_t j = 0; j < n; j += V) store_bytes(s + j, splat(none));
      return pending;
    }
    if (d_.clips && p_.has_columns()) {
      if (d_.has_edges()) {
        add_to(s + c.first, keys_.edge(0) + first + c.first, c.window_first - c.first);
        add_to(s + c.window_end, keys_.edge(1) + first + c.window_end, c.end - c.window_end);
      }
      // A constant of keys that are all hidden may be infinite, and would undo their -inf.
      pending = {c.window_first / V * V, round_up(c.window_end, V),
                 d_.count_real(batch(), first + c.first, first + c.window_first) > 0 ? left_[r] : C{0},
                 d_.count_real(batch(), first + c.window_end, first + c.end) > 0 ? right_[r] : C{0}};
      change(s, pending.begin, c.window_first, [&](Vec<C> v) { return v + pending.left; });
      change(s, c.window_end, pending.end, [&](Vec<C> v) { return v + pending.right; });
    }
    change(s, 0, c.first, [&](Vec<C>) { return splat(none); });
    change(s, c.end, n, [&](Vec<C>) { return splat(none); });
    if (d_.count_real(batch(), first + c.first, first + c.end) < c.end - c.first) {
      const C* const hidden = d_.hidden.get() + batch() * d_.padded + first;
      for (int64_t j = c.first / V * V; j < c.end; j += V)
        store_bytes(s + j, load_bytes<Vec<C>>(hidden + j) == Vec<C>{} ? load_bytes<Vec<C>>(s + j) : splat(none));
    }
    return pending;
  }

 private:
  // What query_rel adds to these rows in these columns, in rows of strip_. The first column begins a vector.
  void multiply_columns(Range rows, Range columns) const {
    multiply<false>(rows.end - rows.first, round_up(columns.end - columns.first, V), p_.rank,
                    Factor<C>{r() + rows.first * d_.rank_pitch, d_.rank_pitch, 1},
                    keys_.tables.query_rel.from(0, columns.first), Vectors<C>{strip_.get(), strip_pitch_});
  }

  // What the terms of the queries add in one column.
  void find_edges(int64_t column, C* edges) const {
    const C bias = p_.bias.data != nullptr ? keys_.tables.bias.get()[column] : C{0};
    if (p_.query_rel.data != nullptr && !whole_) multiply_columns({0, rows_}, {column / V * V, column + 1});
    for (int64_t r = 0; r < rows_; ++r)
      edges[r] = p_.query_rel.data != nullptr ? strip_[r * strip_pitch_ + (whole_ ? column : column % V)] + bias : bias;
  }

  // Adds the terms of the queries to up to kBandRows rows of one run.
  void add_band(int64_t from, int64_t to, int64_t first, const RowSpan* spans, C* s) const {
    Range overlap{p_.window(), 0};
    for (int64_t r = from; r < to; ++r)
      if (spans[r].window_first < spans[r].window_end)
        overlap = {min(overlap.first, column(r, first + spans[r].window_first)),
                   max(overlap.end, column(r, first + spans[r].window_end))};
    if (overlap.empty()) return;
    overlap.first = overlap.first / V * V;
    if (p_.query_rel.data != nullptr && !whole_) multiply_columns({from, to}, overlap);
    const C* const strip = strip_.get() + (whole_ ? from * strip_pitch_ : 0);
    const int64_t base = whole_ ? 0 : overlap.first;
    for (int64_t r = from; r < to; ++r) {
      const int64_t n = spans[r].window_end - spans[r].window_first, c = column(r, first + spans[r].window_first);
      C* const row = s + r * kScorePitch<C> + spans[r].window_first;
      if (p_.query_rel.data != nullptr) add_to(row, strip + (r - from) * strip_pitch_ + c - base, n);
      if (p_.bias.data != nullptr) add_to(row, keys_.tables.bias.get() + c, n);
    }
  }

  // Adds the term of the keys to the rows of one run.
  void add_near(int64_t from, int64_t to, int64_t first, int64_t n, const RowSpan* spans, C* s) const {
    each_near(from, to, first, n, [&](int64_t key, int64_t count, Range rows, int64_t low, Range overlap) {
      multiply<false>(count, overlap.end - overlap.first, p_.channels, Factor<C>{keys_.k.row(key), d_.pitch, 1},
                      keys_.tables.key_rel.from(0, overlap.first),
                      Vectors<C>{near_.get() + overlap.first - low, kNearPitch<C>});
      each_square(key, count, rows, low, [&](int64_t r, int64_t j, int64_t near) CK_INLINE_LAMBDA {
        Vec<C> square[V];
        CK_UNROLL for (int i = 0; i < V; ++i) square[i] =
            load_bytes<Vec<C>>(near_.get() + near + i * (kNearPitch<C> - 1));
        transpose<C>(square);
        CK_UNROLL for (int i = 0; i < V; ++i) {
          if (r + i >= rows.end) break;
          C* const to_row = s + (r + i) * kScorePitch<C> + j - first;
          store_bytes(to_row, load_bytes<Vec<C>>(to_row) + within(spans[r + i], j - first, square[i]));
        }
      });
    });
  }

  const AttentionData<C>& d_;
  const AttentionProblem& p_;
  const Keys<C>& keys_;
  int64_t first_ = 0, rows_ = 0;
  Range seen_{};
  Scratch<C> q_, r_;
  const bool whole_;  // strip_ holds all columns of all rows, otherwise those that one band needs
  const int64_t strip_pitch_;
  Scratch<C> strip_, near_;
  C left_[kQueryRows], right_[kQueryRows];
};

}  // namespace ck::cpu::CK_ISA
