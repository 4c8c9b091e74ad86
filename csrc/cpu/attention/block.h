// Scores of a block of queries and a block of keys: what the forward pass and both halves of the backward pass share.
#pragma once

#include "csrc/cpu/attention/pack.h"

namespace ck::cpu::CK_ISA {

// How a row of scores is cut by the window of its query; positions within the block of keys.
struct Cut {
  int64_t first, window, beyond, end;  // visible from `first` to `end`, the window from `window` to `beyond`
};

// Constants that are still to be added to a row of scores: `left` before `begin`, `right` from `end` on, both at whole
// vectors. They are added within the argument of the exponential.
template <class C>
struct Rest {
  int64_t begin, end;
  C left, right;
};

template <class C, class Body>
CK_INLINE void each_part(const Rest<C>& rest, int64_t n, const Body& body) {
  body(0, int64_t{0}, rest.begin, rest.left);
  body(1, rest.begin, rest.end, C{0});
  body(2, rest.end, n, rest.right);
}

// The largest of a row.
template <class C>
CK_INLINE C largest(const C* s, int64_t n, const Rest<C>& rest) {
  constexpr int V = kLanes<C>;
  Vec<C> top = splat(static_cast<C>(-__builtin_inf()));
  each_part(rest, n, [&](int, int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    for (int64_t j = from; j < to; j += V) top = vmax<C>(top, load_bytes<Vec<C>>(s + j) + constant);
  });
  return max_lanes<C>(top);
}

// What is subtracted from scores. A shift of -inf is that of a row without keys, whose scores are all -inf.
template <class C>
CK_INLINE C shift_of(C top) {
  return top == static_cast<C>(-__builtin_inf()) ? C{0} : top;
}

// s = 2^(s - shift), and the sum of the row.
template <class C>
CK_INLINE C exponentials(C* s, int64_t n, const Rest<C>& rest, C shift) {
  constexpr int V = kLanes<C>;
  Vec<C> sum = {};
  each_part(rest, n, [&](int, int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    for (int64_t j = from; j < to; j += V) {
      const Vec<C> e = vexp2<C>(load_bytes<Vec<C>>(s + j) + (constant - shift));
      store_bytes(s + j, e);
      sum += e;
    }
  });
  return sum_lanes<C>(sum);
}

// WordProduct for vectors: words at even and at odd places are multiplied apart, in lanes twice as wide.
struct VectorProduct {
  CK_INLINE void operator()(uint32_t factor, Vec<uint32_t> word, Vec<uint32_t>& high, Vec<uint32_t>& low) const {
    using Wide = Vec<uint64_t>;
    const Wide lower = splat<uint64_t>(0xffffffffu), upper = ~lower;
    const Wide even = ((Wide)word & lower) * uint64_t{factor}, odd = ((Wide)word >> 32) * uint64_t{factor};
    high = (Vec<uint32_t>)((even >> 32) | (odd & upper));
    low = (Vec<uint32_t>)((even & lower) | (odd << 32));
  }
};

// The even lanes of the result come from a, the odd ones from b: a[0] b[0] a[1] b[1], and so on.
template <class S, int... kLane>
CK_INLINE void interleave(Vec<S> a, Vec<S> b, Vec<S>& low, Vec<S>& high, std::integer_sequence<int, kLane...>) {
  constexpr int V = kLanes<S>;
  using Index = Vec<int32_t>;
  low = __builtin_shuffle(a, b, Index{(kLane % 2 * V + kLane / 2)...});
  high = __builtin_shuffle(a, b, Index{(kLane % 2 * V + kLane / 2 + V / 2)...});
}

// Multipliers 0 or 1 / (1 - dropout) of n elements of a row of p; first and n are multiples of 4. Whole vectors are
// written.
template <class C>
inline void draw(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, C* out) {
  using Words = Vec<uint32_t>;
  constexpr int V = kLanes<uint32_t>;
  constexpr auto kAll = std::make_integer_sequence<int, V>();
  const uint64_t threshold = drop_threshold(p.dropout);
  const C keep = p.dropout < 1.0 ? static_cast<C>(1.0 / (1.0 - p.dropout)) : C{0};
  Words lane = {};
  for (int l = 0; l < V; ++l) lane[l] = static_cast<uint32_t>(l);
  for (int64_t j = 0; j < n; j += 4 * V) {
    Words c[4] = {splat(static_cast<uint32_t>(i)), splat(static_cast<uint32_t>(b)), splat(static_cast<uint32_t>(h)),
                  lane + static_cast<uint32_t>((first + j) / 4)};
    philox_rounds(c[0], c[1], c[2], c[3], static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32),
                  VectorProduct{});
    // Element 4 * l + w belongs to word w of block l.
    Words even[2], odd[2], word[4];
    interleave<uint32_t>(c[0], c[2], even[0], even[1], kAll);
    interleave<uint32_t>(c[1], c[3], odd[0], odd[1], kAll);
    CK_UNROLL for (int w = 0; w < 2; ++w) interleave<uint32_t>(even[w], odd[w], word[2 * w], word[2 * w + 1], kAll);
    for (int64_t w = 0; w < 4 && j + w * V < n; ++w) {
      C* const to = out + j + w * V;
      if constexpr (sizeof(C) == 4) {
        // The threshold of p = 1 does not fit; then both results are 0.
        store_bytes(to, word[w] >= static_cast<uint32_t>(threshold) ? splat(keep) : Vec<C>{});
      } else {
        for (int l = 0; l < V; ++l) to[l] = word[w][l] >= threshold ? keep : C{0};
      }
    }
  }
}

// How the work of `units` (a group of heads in a batch row) is cut into tasks: each into `parts` of its blocks of
// queries. The problem alone decides, so that results are the same bits on any number of threads.
struct Parts {
  // tasks: as many as would do. least_blocks: of a part, to be worth packing the keys again.
  Parts(int64_t unit_count, int64_t block_count, int64_t tasks, int64_t least_blocks)
      : units(unit_count),
        blocks(block_count),
        parts(units == 0 ? 0 : most(1, least(blocks / least_blocks, ceil_div(tasks, units)))) {}

  int64_t tasks() const { return units * parts; }
  Range of(int64_t task) const {
    const int64_t part = task % parts;
    return {blocks * part / parts, blocks * (part + 1) / parts};
  }

  int64_t units, blocks, parts;
};

// Queries whose terms are found together for a block of keys, and the columns that they meet there.
// The first of them begins a vector.
constexpr int64_t kBandRows = 2 * kTileRows;
template <class C>
constexpr int64_t kBandColumns = kKeyColumns + kBandRows + kLanes<C>;

// Keys whose terms are found together, and the distance of their rows: as many columns as a block of queries meets.
constexpr int64_t kNearKeys = 16;
template <class C>
constexpr int64_t kNearPitch = row_pitch<C>(kQueryRows + kNearKeys + 2 * kLanes<C>);

// Up to kQueryRows queries of one head.
template <class C>
class QueryBlock {
 public:
  static constexpr int V = kLanes<C>;
  static constexpr int64_t kStrip = 2 * V;

  QueryBlock(const AttentionData<C>& data, const Keys<C>& keys)
      : d_(data),
        p_(data.p),
        keys_(keys),
        q_(kQueryRows * data.pitch),
        r_(p_.rel_query.data != nullptr ? kQueryRows * data.rank_pitch : 0),
        whole_(p_.window() <= kBandColumns<C>),
        strip_pitch_(row_pitch<C>(least(p_.window(), kBandColumns<C>))),
        strip_(p_.query_rel.data != nullptr ? kQueryRows * strip_pitch_ : 0),
        near_(p_.key_rel.data != nullptr ? kNearKeys * kNearPitch<C> : 0) {}

  // Of the head that the keys have chosen.
  void load(int64_t block) {
    first_ = block * kQueryRows;
    rows_ = least(kQueryRows, p_.queries - first_);
    seen_ = d_.places.seen_by(block);
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
    for (int64_t r = 0; r < rows_; ++r) read_row<C>(p_, source, batch(), query(r), head(), n, 1, to + r * pitch);
  }

  int64_t batch() const { return keys_.batch; }
  int64_t head() const { return keys_.head; }
  int64_t query(int64_t r) const { return first_ + r; }
  int64_t rows() const { return rows_; }
  int64_t first_key() const { return seen_.first / kPanel<C> * kPanel<C>; }  // of those that each_key_block visits
  const Place& place(int64_t r) const { return d_.places.of(first_)[r]; }
  const C* q() const { return q_.get(); }
  const C* r() const { return p_.rel_query.data != nullptr ? r_.get() : q_.get(); }  // what meets query_rel

  // Calls body(first, n) for the blocks of keys that some query sees.
  template <class Body>
  void each_key_block(const Body& body) const {
    const int64_t end = least(d_.padded, round_up(seen_.end, kPanel<C>));
    for (int64_t j = first_key(); j < end; j += kKeyColumns) body(j, least(kKeyColumns, end - j));
  }

  // Columns of the tables that a query may meet.
  Range columns(int64_t r) const {
    const Place& at = place(r);
    if (at.visible.empty()) return {0, 0};
    const auto within = [&](int64_t j) { return most(0, least(column(r, j), p_.window() - 1)); };
    return {within(at.visible.first), within(at.visible.end - 1) + 1};
  }

  // Calls body(column, n, rows) for strips of columns and the rows between the first and the last that meet them.
  template <class Body>
  void each_strip(const Body& body) const {
    Range met[kQueryRows], all{p_.window(), 0};
    for (int64_t r = 0; r < rows_; ++r) {
      met[r] = columns(r);
      if (!met[r].empty()) all = {least(all.first, met[r].first), most(all.end, met[r].end)};
    }
    for (int64_t c = all.first / kStrip * kStrip; c < all.end; c += kStrip) {
      const auto meets = [&](int64_t r) { return met[r].first < c + kStrip && met[r].end > c; };
      Range rows{0, rows_};
      while (!rows.empty() && !meets(rows.first)) ++rows.first;
      while (!rows.empty() && !meets(rows.end - 1)) --rows.end;
      if (!rows.empty()) body(c, least(kStrip, round_up(p_.window() - c, V)), rows);
    }
  }

  // Calls body(from, to) for queries that follow each other in one sequence.
  template <class Body>
  void each_run(const Body& body) const {
    for (int64_t r = 0, end; r < rows_; r = end) {
      end = r + 1;
      // A sequence without keys begins where the next one does.
      const Range& sequence = place(r).sequence;
      while (end < rows_ && place(end).at == place(end - 1).at + 1 && place(end).sequence.first == sequence.first &&
             place(end).sequence.end == sequence.end)
        ++end;
      body(r, end);
    }
  }

  // Calls body(key, n, rows, low, met) for kNearKeys of the n keys from `first` on at a time and the rows of a run
  // within whose windows some are. In the tables of keys, row r meets key j in column place(r).at - j + p.right. low:
  // the least of these, at a whole vector, which the table may not have; met: those that it has, at whole vectors.
  template <class Body>
  void each_near(int64_t from, int64_t to, int64_t first, int64_t n, const Body& body) const {
    const Range& sequence = place(from).sequence;
    const int64_t at = place(from).at, right = p_.causal ? 0 : p_.right;
    for (int64_t key = first; key < first + n; key += kNearKeys) {
      const int64_t count = least(kNearKeys, first + n - key), last = key + count - 1;
      const Range rows{from + most(0, key - right - at), from + least(to - from, last + p_.left + 1 - at)};
      if (rows.empty() || last < sequence.first || key >= sequence.end) continue;
      const int64_t least_column = place(rows.first).at - last + p_.right;
      const int64_t low = least_column >= 0 ? least_column / V * V : -round_up(-least_column, V);
      const int64_t end = least(p_.window(), place(rows.end - 1).at - key + p_.right + 1);
      body(key, count, rows, low, Range{most(0, low), round_up(end, V)});
    }
  }

  // Calls body(r, j, near) for squares of V rows from r on and V keys from j on; near: where, in rows of columns from
  // `low` on, row r meets key j. The next row is to the right of it, the next key below it and one to the left.
  template <class Body>
  CK_INLINE void each_square(int64_t key, int64_t n, Range rows, int64_t low, const Body& body) const {
    for (int64_t r = rows.first; r < rows.end; r += V)
      for (int64_t j = key; j < key + n; j += V)
        body(r, j, (j - key) * kNearPitch<C> + place(r).at - j + p_.right - low);
  }

  // What is zero outside the window of a row; the vector begins at key j of the block of keys.
  CK_INLINE Vec<C> within(const Cut& c, int64_t j, Vec<C> v) const {
    using I = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
    if (c.window <= j && j + V <= c.beyond) return v;
    Vec<I> lane = {};
    for (int l = 0; l < V; ++l) lane[l] = l;
    return (lane >= static_cast<I>(c.window - j)) & (lane < static_cast<I>(c.beyond - j)) ? v : Vec<C>{};
  }

  // Products of queries and keys, and what the relative terms add within the windows, in rows of kScorePitch.
  void multiply_keys(int64_t first, int64_t n, C* s) const {
    if (p_.qk)
      keys_.k.meet(first, n, rows_, q_.get(), s);
    else
      clear(s, rows_ * kScorePitch<C>);
    if (!p_.has_columns()) return;
    Cut cuts[kQueryRows];
    for (int64_t r = 0; r < rows_; ++r) cuts[r] = cut(r, first, n);
    each_run([&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to && p_.has_query_columns(); r += kBandRows)
        add_band(r, least(to, r + kBandRows), first, cuts, s);
      if (p_.key_rel.data != nullptr) add_near(from, to, first, n, cuts, s);
    });
  }

  // Dropout's multipliers of a row of weights.
  void draw_keep(int64_t r, int64_t first, int64_t n, C* keep) const {
    draw(p_, batch(), head(), query(r), first, n, keep);
  }
  // Multiplies a row of weights by them; keep: room for them.
  void drop(int64_t r, int64_t first, int64_t n, C* row, C* keep) const {
    draw_keep(r, first, n, keep);
    for (int64_t j = 0; j < n; j += V) store_bytes(row + j, load_bytes<Vec<C>>(row + j) * load_bytes<Vec<C>>(keep + j));
  }

  Cut cut(int64_t r, int64_t first, int64_t n) const {
    const Place& at = place(r);
    const auto within = [&](int64_t j, int64_t low) { return most(low, least(j - first, n)); };
    Cut c;
    c.first = within(at.visible.first, 0);
    c.end = within(at.visible.end, c.first);
    c.window = least(within(at.at - p_.left, c.first), c.end);
    c.beyond = least(within(at.at + p_.right + 1, c.window), c.end);
    return c;
  }

  bool sees(int64_t r, int64_t j) const { return place(r).visible.first <= j && j < place(r).visible.end; }

  // The column of the tables that belongs to position j.
  int64_t column(int64_t r, int64_t j) const { return j - place(r).at + p_.left; }

  // Adds everything else to a row of products; keys that the query does not see get -inf. A query without keys may hold
  // anything.
  Rest<C> finish(int64_t r, const Cut& c, int64_t first, int64_t n, C* s) const {
    const C none = static_cast<C>(-__builtin_inf());
    Rest<C> rest{0, 0, 0, 0};
    if (c.first == c.end || !d_.sees_something(batch(), place(r).visible)) {
      for (int64_t j = 0; j < n; j += V) store_bytes(s + j, splat(none));
      return rest;
    }
    if (d_.clips && p_.has_columns()) {
      if (d_.has_edges()) {
        add_to(s + c.first, keys_.edge(0) + first + c.first, c.window - c.first);
        add_to(s + c.beyond, keys_.edge(1) + first + c.beyond, c.end - c.beyond);
      }
      // A constant of keys that are all hidden may be infinite, and would undo their -inf.
      rest = {c.window / V * V, round_up(c.beyond, V),
              d_.count_real(batch(), first + c.first, first + c.window) > 0 ? left_[r] : C{0},
              d_.count_real(batch(), first + c.beyond, first + c.end) > 0 ? right_[r] : C{0}};
      for (int64_t j = rest.begin; j < c.window; ++j) s[j] += rest.left;
      for (int64_t j = c.beyond; j < rest.end; ++j) s[j] += rest.right;
    }
    for (int64_t j = 0; j < c.first; ++j) s[j] = none;
    for (int64_t j = c.end; j < n; ++j) s[j] = none;
    if (d_.count_real(batch(), first + c.first, first + c.end) < c.end - c.first) {
      const C* const hidden = d_.hidden.get() + batch() * d_.padded + first;
      for (int64_t j = c.first / V * V; j < c.end; j += V)
        store_bytes(s + j, load_bytes<Vec<C>>(hidden + j) == Vec<C>{} ? load_bytes<Vec<C>>(s + j) : splat(none));
    }
    return rest;
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
  void add_band(int64_t from, int64_t to, int64_t first, const Cut* cuts, C* s) const {
    Range met{p_.window(), 0};
    for (int64_t r = from; r < to; ++r)
      if (cuts[r].window < cuts[r].beyond)
        met = {least(met.first, column(r, first + cuts[r].window)), most(met.end, column(r, first + cuts[r].beyond))};
    if (met.empty()) return;
    met.first = met.first / V * V;
    if (p_.query_rel.data != nullptr && !whole_) multiply_columns({from, to}, met);
    const C* const strip = strip_.get() + (whole_ ? from * strip_pitch_ : 0);
    const int64_t base = whole_ ? 0 : met.first;
    for (int64_t r = from; r < to; ++r) {
      const int64_t n = cuts[r].beyond - cuts[r].window, c = column(r, first + cuts[r].window);
      C* const row = s + r * kScorePitch<C> + cuts[r].window;
      if (p_.query_rel.data != nullptr) add_to(row, strip + (r - from) * strip_pitch_ + c - base, n);
      if (p_.bias.data != nullptr) add_to(row, keys_.tables.bias.get() + c, n);
    }
  }

  // Adds the term of the keys to the rows of one run.
  void add_near(int64_t from, int64_t to, int64_t first, int64_t n, const Cut* cuts, C* s) const {
    each_near(from, to, first, n, [&](int64_t key, int64_t count, Range rows, int64_t low, Range met) {
      multiply<false>(count, met.end - met.first, p_.channels, Factor<C>{keys_.k.row(key), d_.pitch, 1},
                      keys_.tables.key_rel.from(0, met.first),
                      Vectors<C>{near_.get() + met.first - low, kNearPitch<C>});
      each_square(key, count, rows, low, [&](int64_t r, int64_t j, int64_t near) CK_INLINE_LAMBDA {
        Vec<C> square[V];
        CK_UNROLL for (int i = 0; i < V; ++i) square[i] =
            load_bytes<Vec<C>>(near_.get() + near + i * (kNearPitch<C> - 1));
        transpose<C>(square);
        CK_UNROLL for (int i = 0; i < V; ++i) {
          if (r + i >= rows.end) break;
          C* const to_row = s + (r + i) * kScorePitch<C> + j - first;
          store_bytes(to_row, load_bytes<Vec<C>>(to_row) + within(cuts[r + i], j - first, square[i]));
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
  const bool whole_;  // strip_ holds all columns of all rows, otherwise those that one band meets
  const int64_t strip_pitch_;
  Scratch<C> strip_, near_;
  C left_[kQueryRows], right_[kQueryRows];
};

}  // namespace ck::cpu::CK_ISA
