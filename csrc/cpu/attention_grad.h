// attention_grad. Probabilities are found again from lse. One pass is owned by blocks of queries: d(q), d(rel_query),
// the tables of queries, the depthwise term's tables. The other is owned by blocks of keys: d(k), d(v), key_rel.
//
// With dP the gradient of p, the gradient of a score is p (dP - delta), where delta = sum of p dP over the row, less
// grad_lse. delta is known only after a row has been walked to its end, and so the first pass sums p dP and p apart and
// subtracts delta times the second sum at the end: all that follows from the scores' gradient is linear in it.
#pragma once

#include "attention_grad_keys.h"

namespace ck::cpu::CK_ISA {

template <class C>
struct QuerySums {
  TableSums<C> bias, query_rel, value_conv, value_conv_bias, value_conv_scale;

  QuerySums(const AttentionBackward& p, const AttentionData<C>& d, const Parts& parts)
      : bias(p.grad_bias != nullptr, parts, 1, 1, d.window_pitch),
        query_rel(p.grad_query_rel != nullptr, parts, 1, p.rank, d.window_pitch),
        value_conv(p.grad_value_conv != nullptr, parts, 1, p.window(), d.pitch),
        value_conv_bias(p.grad_value_conv_bias != nullptr, parts, 1, 1, d.pitch),
        value_conv_scale(p.grad_value_conv_scale != nullptr, parts, 1, 1, 1) {}

  void finish(const AttentionBackward& p, const AttentionData<C>& d) const {
    const Axis columns{p.window(), 1}, one{1, 0}, taps{p.window(), d.pitch}, channels{p.channels, 1};
    bias.finish(p, p.bias, p.grad_bias, 0, one, columns, 1);
    query_rel.finish(p, p.query_rel, p.grad_query_rel, 0, {p.rank, d.window_pitch}, columns, 1);
    value_conv.finish(p, p.value_conv, p.grad_value_conv, 0, channels, taps, 1);
    value_conv_bias.finish(p, p.value_conv_bias, p.grad_value_conv_bias, 0, channels, one, 1);
    value_conv_scale.finish(p, p.value_conv_scale, p.grad_value_conv_scale, 0, one, one, 1);
  }
};

template <class C>
class QueryTask {
 public:
  QueryTask(const AttentionBackward& p, const AttentionData<C>& data, C* delta)
      : p_(p),
        d_(data),
        delta_(delta),
        scores_(needs_scores(p)),
        folds_(scores_ && p.has_query_columns()),
        block_(data),
        grad_(kQueryRows * data.pitch),
        pair_(2 * kQueryRows * kKeyColumns),
        keep_(p.dropout > 0.0 ? kKeyColumns : 0),
        sums_(2 * kQueryRows * data.pitch),
        columns_(folds_ ? 2 * kQueryRows * data.window_pitch : 0),
        rel_(kQueryRows * data.rank_pitch),
        row_(data.pitch) {}

  // Anything that follows from the gradient of the scores: all but v and the depthwise term's tables.
  static bool needs_scores(const AttentionBackward& p) {
    return p.grad_q.data != nullptr || p.grad_rel_query.data != nullptr || p.grad_bias != nullptr ||
           p.grad_query_rel != nullptr || needs_delta(p);
  }
  static bool needs_delta(const AttentionBackward& p) { return p.grad_k.data != nullptr || p.grad_key_rel != nullptr; }
  static bool needs_taps(const AttentionBackward& p) {
    return p.grad_value_conv != nullptr || p.grad_value_conv_bias != nullptr || p.grad_value_conv_scale != nullptr;
  }

  // Blocks `range` of one head; its tables' sums are those of `task`.
  void run(int64_t b, int64_t h, Range range, QuerySums<C>& sums, int64_t task) {
    bias_ = p_.grad_bias != nullptr ? sums.bias.open(task, 0) : nullptr;
    query_rel_ = p_.grad_query_rel != nullptr ? sums.query_rel.open(task, 0) : nullptr;
    value_conv_ = p_.grad_value_conv != nullptr ? sums.value_conv.open(task, 0) : nullptr;
    value_conv_bias_ = p_.grad_value_conv_bias != nullptr ? sums.value_conv_bias.open(task, 0) : nullptr;
    value_conv_scale_ = p_.grad_value_conv_scale != nullptr ? sums.value_conv_scale.open(task, 0) : nullptr;
    for (int64_t block = range.first; block < range.end; ++block) {
      block_.load(b, h, block);
      for (int64_t r = 0; r < block_.rows(); ++r)
        read_row<C>(p_, p_.grad, b, block_.query(r), h, p_.channels, 1, grad_.get() + r * d_.pitch);
      if (scores_) walk();
      if (needs_taps(p_))
        for (int64_t r = 0; r < block_.rows(); ++r) add_taps(r);
    }
  }

 private:
  // p dP of row r lies in row r of the pairs, p in row rows + r; likewise their sums.
  void walk() {
    const int64_t b = block_.batch(), h = block_.head(), g = block_.group(), rows = block_.rows();
    const bool products = p_.grad_q.data != nullptr && p_.qk;
    if (products) clear(sums_.get(), 2 * rows * d_.pitch);
    if (folds_) clear(columns_.get(), 2 * rows * d_.window_pitch);
    clear(row_delta_, kQueryRows);
    block_.each_key_block([&](int64_t first, int64_t n) {
      C* const weighted = pair_.get();
      C* const plain = weighted + rows * kKeyColumns;
      block_.multiply_keys(first, n, plain);
      d_.v.meet(b, g, first, n, rows, grad_.get(), weighted);
      for (int64_t r = 0; r < rows; ++r) weigh(r, first, n, weighted + r * kKeyColumns, plain + r * kKeyColumns);
      if (products)
        multiply<true>(2 * rows, d_.pitch, n, Factor<C>{pair_.get(), kKeyColumns, 1}, d_.k.row(b, g, first), d_.pitch,
                       sums_.get(), d_.pitch);
    });
    for (int64_t r = 0; r < rows; ++r) {
      if (p_.grad_lse.data != nullptr && !sees_nothing(r))
        row_delta_[r] -= scalar<C>(p_.grad_lse, b, h, block_.query(r));
      delta_[(b * p_.heads + h) * p_.queries + block_.query(r)] = row_delta_[r];
      if (folds_) add_to(column_row(r), column_row(rows + r), d_.window_pitch, -row_delta_[r]);
    }
    if (folds_) finish_tables();
    if (p_.grad_q.data != nullptr) write_queries(products);
  }

  bool sees_nothing(int64_t r) const { return lse(r) == static_cast<C>(-__builtin_inf()); }
  C lse(int64_t r) const { return scalar<C>(p_.lse, block_.batch(), block_.head(), block_.query(r)); }
  C* column_row(int64_t r) { return columns_.get() + r * d_.window_pitch; }

  void weigh(int64_t r, int64_t first, int64_t n, C* weighted, C* plain) {
    constexpr int V = kLanes<C>;
    exponentials(plain, n, block_.finish(r, first, n, plain), lse(r));
    if (p_.dropout > 0.0) {
      draw(p_, block_.batch(), block_.head(), block_.query(r), first, n, keep_.get());
      for (int64_t j = 0; j < n; j += V)
        store_bytes(weighted + j, load_bytes<Vec<C>>(weighted + j) * load_bytes<Vec<C>>(keep_.get() + j));
    }
    Vec<C> sum = {};
    for (int64_t j = 0; j < n; j += V) {
      const Vec<C> product = load_bytes<Vec<C>>(weighted + j) * load_bytes<Vec<C>>(plain + j);
      store_bytes(weighted + j, product);
      sum += product;
    }
    row_delta_[r] += sum_lanes<C>(sum);
    if (!folds_) return;
    const Cut cut = block_.cut(r, first, n);
    fold(cut, r, first, weighted, column_row(r));
    fold(cut, r, first, plain, column_row(block_.rows() + r));
  }

  // Adds a row over the keys to the columns that the keys belong to.
  void fold(const Cut& cut, int64_t r, int64_t first, const C* row, C* columns) const {
    if (cut.window < cut.beyond)
      add_to(columns + block_.column(r, first + cut.window), row + cut.window, cut.beyond - cut.window);
    if (!p_.clips()) return;
    columns[0] += total(row + cut.first, cut.window - cut.first);
    columns[p_.window() - 1] += total(row + cut.beyond, cut.end - cut.beyond);
  }

  void finish_tables() {
    const int64_t rows = block_.rows();
    if (bias_ != nullptr)
      for (int64_t r = 0; r < rows; ++r) add_to(bias_, column_row(r), d_.window_pitch);
    if (query_rel_ != nullptr)
      multiply<true>(p_.rank, d_.window_pitch, rows, Factor<C>{block_.r(), 1, d_.rank_pitch}, columns_.get(),
                     d_.window_pitch, query_rel_, d_.window_pitch);
    if (p_.query_rel.data == nullptr) return;
    multiply<false>(rows, d_.rank_pitch, p_.window(), Factor<C>{columns_.get(), d_.window_pitch, 1},
                    d_.query_columns.of(block_.head()), d_.rank_pitch, rel_.get(), d_.rank_pitch);
    if (p_.grad_rel_query.data != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        write_row(p_, p_.grad_rel_query, block_.batch(), block_.query(r), block_.head(), p_.rank,
                  rel_.get() + r * d_.rank_pitch);
  }

  void write_queries(bool products) {
    constexpr int V = kLanes<C>;
    const int64_t rows = block_.rows();
    for (int64_t r = 0; r < rows; ++r) {
      clear(row_.get(), d_.pitch);
      if (products) {
        const C *const weighted = sums_.get() + r * d_.pitch, *const plain = weighted + rows * d_.pitch;
        for (int64_t c = 0; c < d_.pitch; c += V)
          store_bytes(row_.get() + c,
                      (load_bytes<Vec<C>>(weighted + c) - load_bytes<Vec<C>>(plain + c) * row_delta_[r]) * d_.scale());
      }
      if (p_.query_rel.data != nullptr && p_.rel_query.data == nullptr)
        add_to(row_.get(), rel_.get() + r * d_.rank_pitch, d_.pitch);
      write_row(p_, p_.grad_q, block_.batch(), block_.query(r), block_.head(), p_.channels, row_.get());
    }
  }

  // The depthwise term's tables.
  void add_taps(int64_t r) {
    const int64_t b = block_.batch(), h = block_.head();
    const Place& place = block_.place(r);
    C* const grad = grad_.get() + r * d_.pitch;
    if (value_conv_scale_ != nullptr) {
      d_.convolve(b, h, place, row_.get());
      *value_conv_scale_ += dot(grad, row_.get(), p_.channels);
    }
    const C scale = d_.conv_scale(h);
    for (int64_t c = 0; c < d_.pitch; c += kLanes<C>) store_bytes(grad + c, load_bytes<Vec<C>>(grad + c) * scale);
    if (value_conv_bias_ != nullptr) add_to(value_conv_bias_, grad, d_.pitch);
    if (value_conv_ == nullptr) return;
    const Range taps = place.taps(p_);
    for (int64_t c = taps.first; c < taps.end; ++c)
      d_.multiply_add(value_conv_ + c * d_.pitch, grad, d_.v.row(b, block_.group(), place.at - p_.left + c));
  }

  const AttentionBackward& p_;
  const AttentionData<C>& d_;
  C* const delta_;  // [batch][heads][queries], for the pass over the keys
  const bool scores_, folds_;
  QueryBlock<C> block_;
  Scratch<C> grad_, pair_, keep_, sums_, columns_, rel_, row_;
  C row_delta_[kQueryRows];
  C *bias_ = nullptr, *query_rel_ = nullptr, *value_conv_ = nullptr, *value_conv_bias_ = nullptr,
    *value_conv_scale_ = nullptr;
};

template <class C>
inline const char* attention_grad_typed(const AttentionBackward& p) {
  const AttentionData<C> data(p, true);
  const bool taps = QueryTask<C>::needs_taps(p), needs_delta = QueryTask<C>::needs_delta(p);
  Scratch<C> delta(p.batch * p.heads * p.queries);
  if (QueryTask<C>::needs_scores(p) || taps) {
    const Parts parts(p.batch * p.heads, ceil_div(p.queries, kQueryRows));
    QuerySums<C> sums(p, data, parts);
    parallel(p, parts.tasks(), data.threads, [&](int64_t begin, int64_t end) {
      QueryTask<C> task(p, data, delta.get());
      for (int64_t n = begin; n < end; ++n)
        task.run(n / parts.parts / p.heads, n / parts.parts % p.heads, parts.of(n), sums, n);
    });
    sums.finish(p, data);
  }
  if (needs_delta || p.grad_v.data != nullptr) {
    const Parts parts(p.batch * p.groups, ceil_div(p.keys, kKeyColumns));
    TableSums<C> sums(p.grad_key_rel != nullptr, parts, p.sharing(), p.channels, data.window_pitch);
    parallel(p, parts.tasks(), data.threads, [&](int64_t begin, int64_t end) {
      KeyTask<C> task(p, data, delta.get(), needs_delta);
      for (int64_t n = begin; n < end; ++n)
        task.run(n / parts.parts / p.groups, n / parts.parts % p.groups, parts.of(n), sums, n);
    });
    // Column c was summed as column W-1-c, the order in which keys see queries.
    sums.finish(p, p.key_rel, p.grad_key_rel, p.window() - 1, {p.channels, data.window_pitch}, {p.window(), -1},
                data.scale());
  }
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
