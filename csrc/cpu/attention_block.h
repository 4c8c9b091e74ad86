// Scores of a block of queries and a block of keys: what the forward pass and both halves of the backward pass share.
#pragma once

#include "attention_pack.h"

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
  body(int64_t{0}, rest.begin, rest.left);
  body(rest.begin, rest.end, C{0});
  body(rest.end, n, rest.right);
}

// The largest of a row.
template <class C>
CK_INLINE C largest(const C* s, int64_t n, const Rest<C>& rest) {
  constexpr int V = kLanes<C>;
  Vec<C> top = splat(static_cast<C>(-__builtin_inf()));
  each_part(rest, n, [&](int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    for (int64_t j = from; j < to; j += V) top = vmax<C>(top, load_bytes<Vec<C>>(s + j) + constant);
  });
  return max_lanes<C>(top);
}

// s = exp(s - shift), and the sum of the row. A shift of -inf is that of a row without keys, which becomes 0.
template <class C>
CK_INLINE C exponentials(C* s, int64_t n, const Rest<C>& rest, C shift) {
  constexpr int V = kLanes<C>;
  const C less = shift == static_cast<C>(-__builtin_inf()) ? C{0} : shift;
  Vec<C> sum = {};
  each_part(rest, n, [&](int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
    for (int64_t j = from; j < to; j += V) {
      const Vec<C> e = vexp(load_bytes<Vec<C>>(s + j) + (constant - less));
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

// Multipliers 0 or 1 / (1 - dropout) of n elements of a row of p; first and n are multiples of 4.
template <class C>
inline void draw(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, C* out) {
  using Words = Vec<uint32_t>;
  constexpr int V = kLanes<uint32_t>;
  const uint64_t threshold = drop_threshold(p.dropout);
  const C keep = p.dropout < 1.0 ? static_cast<C>(1.0 / (1.0 - p.dropout)) : C{0};
  Words lane = {};
  for (int l = 0; l < V; ++l) lane[l] = static_cast<uint32_t>(l);
  for (int64_t j = 0; j < n; j += 4 * V) {
    Words c[4] = {splat(static_cast<uint32_t>(i)), splat(static_cast<uint32_t>(b)), splat(static_cast<uint32_t>(h)),
                  lane + static_cast<uint32_t>((first + j) / 4)};
    philox_rounds(c[0], c[1], c[2], c[3], static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32),
                  VectorProduct{});
    uint32_t word[4][V];
    for (int w = 0; w < 4; ++w) store_bytes(word[w], c[w]);
    for (int64_t l = 0; l < least(4 * V, n - j); ++l) out[j + l] = word[l % 4][l / 4] >= threshold ? keep : C{0};
  }
}

// Up to kQueryRows queries of one head.
template <class C>
class QueryBlock {
 public:
  static constexpr int V = kLanes<C>;

  explicit QueryBlock(const AttentionData<C>& data)
      : d_(data),
        p_(data.p),
        q_(kQueryRows * data.pitch),
        r_(p_.query_rel.data != nullptr ? kQueryRows * data.rank_pitch : 0),
        window_(p_.has_columns() ? kQueryRows * data.window_pitch : 0),
        near_(p_.key_rel.data != nullptr ? (kQueryRows + p_.window()) * data.window_pitch : 0) {}

  void load(int64_t b, int64_t h, int64_t block) {
    b_ = b;
    h_ = h;
    first_ = block * kQueryRows;
    rows_ = least(kQueryRows, p_.queries - first_);
    keys_ = d_.places.seen_by(block);
    for (int64_t r = 0; r < rows_; ++r)
      read_row<C>(p_, p_.q, b, first_ + r, h, p_.channels, d_.scale(), q_.get() + r * d_.pitch);
    if (p_.has_columns()) fill_window();
  }

  int64_t batch() const { return b_; }
  int64_t head() const { return h_; }
  int64_t group() const { return h_ / p_.sharing(); }
  int64_t query(int64_t r) const { return first_ + r; }
  int64_t rows() const { return rows_; }
  const Place& place(int64_t r) const { return d_.places.of(first_)[r]; }
  const C* q() const { return q_.get(); }  // times scale
  const C* r() const { return r_.get(); }  // what meets query_rel, times rel_scale

  // Calls body(first, n) for the blocks of keys that some query sees.
  template <class Body>
  void each_key_block(const Body& body) const {
    const int64_t end = least(d_.padded, round_up(keys_.end, kPanel<C>));
    for (int64_t j = keys_.first / kPanel<C> * kPanel<C>; j < end; j += kKeyColumns)
      body(j, least(kKeyColumns, end - j));
  }

  // Products of queries and keys, [rows][kKeyColumns].
  void multiply_keys(int64_t first, int64_t n, C* s) const {
    if (p_.qk)
      d_.k.meet(b_, group(), first, n, rows_, q_.get(), s);
    else
      clear(s, rows_ * kKeyColumns);
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

  // The column of the tables that belongs to position j.
  int64_t column(int64_t r, int64_t j) const { return j - place(r).at + p_.left; }

  // Adds everything else to a row of products; keys that the query does not see get -inf. A query without keys may hold
  // anything.
  Rest<C> finish(int64_t r, int64_t first, int64_t n, C* s) const {
    const C none = static_cast<C>(-__builtin_inf());
    const Cut c = cut(r, first, n);
    Rest<C> rest{0, 0, 0, 0};
    if (c.first == c.end || !d_.sees_something(b_, place(r).visible)) {
      for (int64_t j = 0; j < n; j += V) store_bytes(s + j, splat(none));
      return rest;
    }
    if (p_.has_columns()) {
      if (d_.has_edges()) {
        add_to(s + c.first, d_.edge(b_, h_, 0) + first + c.first, c.window - c.first);
        add_to(s + c.beyond, d_.edge(b_, h_, 1) + first + c.beyond, c.end - c.beyond);
      }
      add_to(s + c.window, window_.get() + r * d_.window_pitch + column(r, first + c.window), c.beyond - c.window);
      rest = {c.window / V * V, round_up(c.beyond, V), left_[r], right_[r]};
      for (int64_t j = rest.begin; j < c.window; ++j) s[j] += rest.left;
      for (int64_t j = c.beyond; j < rest.end; ++j) s[j] += rest.right;
    }
    for (int64_t j = 0; j < c.first; ++j) s[j] = none;
    for (int64_t j = c.end; j < n; ++j) s[j] = none;
    if (p_.key_mask != nullptr) {
      const C* const hidden = d_.hidden.get() + b_ * d_.padded + first;
      for (int64_t j = c.first / V * V; j < c.end; j += V)
        store_bytes(s + j, load_bytes<Vec<C>>(hidden + j) == Vec<C>{} ? load_bytes<Vec<C>>(s + j) : splat(none));
    }
    return rest;
  }

 private:
  // What the relative terms add within the window of each row, and what those of the query add outside it.
  void fill_window() {
    const int64_t W = p_.window(), pitch = d_.window_pitch;
    C* const window = window_.get();
    if (p_.query_rel.data != nullptr) {
      const HeadRows& source = p_.rel_query.data != nullptr ? p_.rel_query : p_.q;
      for (int64_t r = 0; r < rows_; ++r)
        read_row<C>(p_, source, b_, first_ + r, h_, p_.rank, static_cast<C>(p_.rel_scale),
                    r_.get() + r * d_.rank_pitch);
      multiply<false>(rows_, pitch, p_.rank, Factor<C>{r_.get(), d_.rank_pitch, 1}, d_.query_rel.of(h_), pitch, window,
                      pitch);
    } else {
      clear(window, rows_ * pitch);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      C* const row = window + r * pitch;
      if (p_.bias.data != nullptr) add_to(row, d_.bias.of(h_), pitch);
      left_[r] = p_.clips() ? row[0] : C{0};
      right_[r] = p_.clips() ? row[W - 1] : C{0};
    }
    if (p_.key_rel.data == nullptr) return;
    for (int64_t r = 0; r < rows_;) {
      int64_t end = r + 1;  // of queries that follow each other in one sequence
      while (end < rows_ && place(end).at == place(end - 1).at + 1 &&
             place(end).sequence.first == place(r).sequence.first)
        ++end;
      add_near_keys(r, end);
      r = end;
    }
  }

  void add_near_keys(int64_t from, int64_t to) {
    const int64_t W = p_.window(), pitch = d_.window_pitch;
    const Range sequence = place(from).sequence;
    const int64_t first = most(sequence.first, place(from).at - p_.left);
    const int64_t end = least(sequence.end, place(to - 1).at + p_.right + 1);
    if (first >= end) return;
    multiply<false>(end - first, pitch, p_.channels, Factor<C>{d_.k.row(b_, group(), first), d_.pitch, 1},
                    d_.key_rel.of(h_), pitch, near_.get(), pitch);
    for (int64_t r = from; r < to; ++r) {
      const int64_t start = place(r).at - p_.left;
      for (int64_t c = most(0, first - start); c < least(W, end - start); ++c)
        window_[r * pitch + c] += near_[(start + c - first) * pitch + c];
    }
  }

  const AttentionData<C>& d_;
  const AttentionProblem& p_;
  int64_t b_ = 0, h_ = 0, first_ = 0, rows_ = 0;
  Range keys_{};
  Scratch<C> q_, r_, window_, near_;
  C left_[kQueryRows], right_[kQueryRows];
};

}  // namespace ck::cpu::CK_ISA
