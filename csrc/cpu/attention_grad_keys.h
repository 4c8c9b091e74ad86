// attention_grad: the pass that is owned by blocks of keys. For each of the heads that share them it walks over the
// queries: d(k), d(v), and d(key_rel).
#pragma once

#include "attention_block.h"
#include "attention_sums.h"

namespace ck::cpu::CK_ISA {

template <class C>
class KeyTask {
 public:
  // scores: also what follows from the gradient of the scores, for which `delta` is needed.
  KeyTask(const AttentionBackward& p, const AttentionData<C>& data, const C* delta, bool scores)
      : p_(p),
        d_(data),
        delta_(delta),
        scores_(scores),
        folds_(scores && p.key_rel.data != nullptr),
        block_(data),
        grad_(kQueryRows * data.pitch),
        p_rows_(kQueryRows * kKeyColumns),
        ds_rows_(scores ? kQueryRows * kKeyColumns : 0),
        keep_(p.dropout > 0.0 ? kKeyColumns : 0),
        grad_k_(scores ? kKeyColumns * data.pitch : 0),
        grad_v_(kKeyColumns * data.pitch),
        columns_(folds_ ? kKeyColumns * data.window_pitch : 0),
        edges_(folds_ ? 2 * kKeyColumns : 0) {}

  // Blocks `range` of one group of heads; the sums of head n of the group are those of `task`.
  void run(int64_t b, int64_t g, Range range, TableSums<C>& sums, int64_t task) {
    const int64_t sharing = p_.sharing(), blocks = ceil_div(p_.queries, kQueryRows);
    for (int64_t n = 0; n < sharing && p_.grad_key_rel != nullptr; ++n) sums.open(task, n);
    for (int64_t block = range.first; block < range.end; ++block) {
      first_ = block * kKeyColumns;
      n_ = least(kKeyColumns, d_.padded - first_);
      if (scores_) clear(grad_k_.get(), n_ * d_.pitch);
      clear(grad_v_.get(), n_ * d_.pitch);
      for (int64_t n = 0; n < sharing; ++n) {
        if (folds_) {
          clear(columns_.get(), n_ * d_.window_pitch);
          clear(edges_.get(), 2 * kKeyColumns);
        }
        for (int64_t q = 0; q < blocks; ++q) {
          const Range seen = d_.places.seen_by(q);
          if (seen.first < first_ + n_ && seen.end > first_) add_queries(b, g * sharing + n, q);
        }
        if (folds_) finish_columns(b, g, g * sharing + n, p_.grad_key_rel != nullptr ? sums.of(task, n) : nullptr);
      }
      write(b, g);
    }
  }

 private:
  void add_queries(int64_t b, int64_t h, int64_t q) {
    block_.load(b, h, q);
    const int64_t rows = block_.rows(), g = block_.group();
    for (int64_t r = 0; r < rows; ++r)
      read_row<C>(p_, p_.grad, b, block_.query(r), h, p_.channels, 1, grad_.get() + r * d_.pitch);
    block_.multiply_keys(first_, n_, p_rows_.get());
    if (scores_) d_.v.meet(b, g, first_, n_, rows, grad_.get(), ds_rows_.get());
    for (int64_t r = 0; r < rows; ++r) weigh(r);
    const Factor<C> by_key{p_rows_.get(), 1, kKeyColumns};
    multiply<true>(n_, d_.pitch, rows, by_key, grad_.get(), d_.pitch, grad_v_.get(), d_.pitch);
    if (scores_ && p_.qk)
      multiply<true>(n_, d_.pitch, rows, Factor<C>{ds_rows_.get(), 1, kKeyColumns}, block_.q(), d_.pitch, grad_k_.get(),
                     d_.pitch);
    if (p_.value_conv.data != nullptr)
      for (int64_t r = 0; r < rows; ++r) add_taps(r);
  }

  // Leaves p after dropout, and the gradients of the scores.
  void weigh(int64_t r) {
    constexpr int V = kLanes<C>;
    const int64_t b = block_.batch(), h = block_.head(), i = block_.query(r);
    C* const probability = p_rows_.get() + r * kKeyColumns;
    C* const ds = scores_ ? ds_rows_.get() + r * kKeyColumns : nullptr;
    exponentials(probability, n_, block_.finish(r, first_, n_, probability), scalar<C>(p_.lse, b, h, i));
    const bool drops = p_.dropout > 0.0;
    if (drops) draw(p_, b, h, i, first_, n_, keep_.get());
    const C delta = scores_ ? delta_[(b * p_.heads + h) * p_.queries + i] : C{0};
    for (int64_t j = 0; j < n_; j += V) {
      const Vec<C> p = load_bytes<Vec<C>>(probability + j);
      const Vec<C> keep = drops ? load_bytes<Vec<C>>(keep_.get() + j) : splat(C{1});
      if (scores_) store_bytes(ds + j, p * (load_bytes<Vec<C>>(ds + j) * keep - delta));
      store_bytes(probability + j, p * keep);
    }
    if (folds_) fold(r, ds);
  }

  // Adds a row over the keys to the columns of each key.
  void fold(int64_t r, const C* row) {
    const Cut cut = block_.cut(r, first_, n_);
    for (int64_t j = cut.window; j < cut.beyond; ++j)
      columns_[j * d_.window_pitch + block_.column(r, first_ + j)] += row[j];
    if (!p_.clips()) return;
    add_to(edges_.get() + cut.first, row + cut.first, cut.window - cut.first);
    add_to(edges_.get() + kKeyColumns + cut.beyond, row + cut.beyond, cut.end - cut.beyond);
  }

  void finish_columns(int64_t b, int64_t g, int64_t h, C* sums) {
    const int64_t pitch = d_.window_pitch, W = p_.window();
    for (int64_t j = 0; j < n_; ++j) {
      columns_[j * pitch] += edges_[j];
      columns_[j * pitch + W - 1] += edges_[kKeyColumns + j];
    }
    if (sums != nullptr)
      multiply<true>(p_.channels, pitch, n_, Factor<C>{d_.k.row(b, g, first_), 1, d_.pitch}, columns_.get(), pitch,
                     sums, pitch);
    if (p_.grad_k.data != nullptr)
      multiply<true>(n_, d_.pitch, W, Factor<C>{columns_.get(), pitch, 1}, d_.key_columns.of(h), d_.pitch,
                     grad_k_.get(), d_.pitch);
  }

  // What the depthwise term of one query passes on to its values.
  void add_taps(int64_t r) {
    const int64_t h = block_.head(), start = block_.place(r).at - p_.left;
    const Range taps = block_.place(r).taps(p_);
    C* const grad = grad_.get() + r * d_.pitch;
    const C scale = d_.conv_scale(h);
    for (int64_t c = 0; c < d_.pitch; c += kLanes<C>) store_bytes(grad + c, load_bytes<Vec<C>>(grad + c) * scale);
    const int64_t end = least(taps.end, first_ + n_ - start);
    for (int64_t c = most(taps.first, first_ - start); c < end; ++c)
      d_.multiply_add(grad_v_.get() + (start + c - first_) * d_.pitch, grad, d_.value_conv.of(h) + c * d_.pitch);
  }

  // Keys that the mask hides have no gradient.
  void write(int64_t b, int64_t g) {
    const int64_t n = least(n_, p_.keys - first_);
    for (int64_t j = 0; j < n; ++j) {
      C* const own[2] = {scores_ ? grad_k_.get() + j * d_.pitch : nullptr, grad_v_.get() + j * d_.pitch};
      const HeadRows* const to[2] = {&p_.grad_k, &p_.grad_v};
      for (int64_t t = 0; t < 2; ++t) {
        if (to[t]->data == nullptr) continue;
        if (p_.key_mask != nullptr && d_.hidden[b * d_.padded + first_ + j] != C{0}) clear(own[t], d_.pitch);
        write_row(p_, *to[t], b, first_ + j, g, p_.channels, own[t]);
      }
    }
  }

  const AttentionBackward& p_;
  const AttentionData<C>& d_;
  const C* const delta_;
  const bool scores_, folds_;
  QueryBlock<C> block_;
  Scratch<C> grad_, p_rows_, ds_rows_, keep_, grad_k_, grad_v_, columns_, edges_;
  int64_t first_ = 0, n_ = 0;
};

}  // namespace ck::cpu::CK_ISA
