// The backward pass. A task takes blocks of queries of one group of heads: each block walks over the keys, recomputes
// the probabilities p from lse, and adds to d(k) and d(v), which the task sums for all keys, to d(q) of its own rows,
// and to the sums of the tables.
//
// With dP the gradient of p, the gradient of a score is p (dP - delta), where delta is the sum of p dP over the row,
// less grad_lse. grad * out, summed over the channels, is the same number, but out has been rounded and contains the
// depthwise term; the error would reach every gradient of the row, and add up in a table's column that sums over many
// keys. So a block keeps p and dP of all keys it sees until their sum is known.
#pragma once

#include "csrc/cpu/attention/sums.h"

namespace ck::cpu::CK_ISA {

template <class C>
class AttentionBackwardTask {
 public:
  AttentionBackwardTask(const AttentionBackward& p, const AttentionData<C>& data)
      : p_(p),
        d_(data),
        scores_(needs_scores(p)),
        sums_query_columns_(scores_ && p.has_query_columns()),
        sums_key_columns_(scores_ && p.key_rel.data != nullptr),
        keys_(data, true),
        block_(data, keys_),
        grad_(kQueryRows * data.pitch),
        p_rows_((scores_ ? tiles(data) : 1) * kTileSize),
        ds_rows_(scores_ ? tiles(data) * kTileSize : 0),
        dropped_(p.dropout > 0.0 ? kTileSize : 0),
        clean_(max(kQueryRows, kKeyColumns) * max(data.pitch, data.rank_pitch)),
        grad_q_(kQueryRows * data.pitch),
        strip_(sums_query_columns_ ? kQueryRows * kStrip : 0),
        rel_(sums_query_columns_ ? kQueryRows * round_up(p.rank, kLanes<C>) : 0),
        row_(data.width),
        taps_(p.grad_value_conv != nullptr ? p.window() * data.width : 0),
        near_(sums_key_columns_ ? kNearKeys * kNearPitch<C> : 0),
        key_edges_(sums_key_columns_ ? 2 * data.padded : 0) {}

  // Blocks `range` of the heads of one group, which follow each other. keys: d(k) before its scale and d(v) of the
  // group, rows of `pitch`.
  void run(int64_t b, int64_t g, Range range, const GradientTables<C>& tables, C* sums, C* keys) {
    tables_ = &tables;
    grad_k_ = keys;
    grad_v_ = keys + d_.padded * d_.pitch;
    keys_.load(b, g);
    for (int64_t n = 0; n < p_.sharing(); ++n) {
      const int64_t first = n * d_.blocks();
      const Range blocks{max(range.first - first, 0), min(range.end - first, d_.blocks())};
      if (blocks.empty()) continue;
      keys_.choose_head(g * p_.sharing() + n);
      C* const head = sums + n * tables.size;
      bias_ = tables.bias.of(head);
      query_rel_ = tables.query_rel.of(head);
      key_rel_ = tables.key_rel.of(head);
      value_conv_ = tables.value_conv.of(head);
      value_conv_bias_ = tables.value_conv_bias.of(head);
      value_conv_scale_ = tables.value_conv_scale.of(head);
      if (sums_key_columns_) clear(key_edges_.get(), 2 * d_.padded);
      for (int64_t block = blocks.first; block < blocks.end; ++block) run_block(block);
      if (sums_key_columns_ && d_.clips) finish_edges();
    }
  }

 private:
  static constexpr int64_t kTileSize = kQueryRows * kScorePitch<C>, kStrip = QueryBlock<C>::kStrip;
  // Blocks of keys that one block of queries may see.
  static int64_t tiles(const AttentionData<C>& d) { return ceil_div(d.positions.max_seen() + kPanel<C>, kKeyColumns); }

  // Anything that follows from the gradient of the scores: all but v and the depthwise term's tables.
  static bool needs_scores(const AttentionBackward& p) {
    return p.grad_q.data != nullptr || p.grad_k.data != nullptr || p.grad_rel_query.data != nullptr ||
           p.grad_bias != nullptr || p.grad_query_rel != nullptr || p.grad_key_rel != nullptr;
  }

  void run_block(int64_t block) {
    block_.load(block);
    const int64_t rows = block_.rows();
    block_.read(p_.grad, p_.channels, grad_.get(), d_.pitch);
    for (int64_t r = 0; r < rows; ++r) {
      const C lse = scalar<C>(p_.lse, block_.batch(), block_.head(), block_.query(r));
      shift_[r] = shift_of(lse) * static_cast<C>(kLog2e);
      // A row with lse = -inf sees no keys; where results of several calls are merged its grad_lse is NaN.
      empty_[r] = lse == static_cast<C>(-__builtin_inf());
      grad_lse_[r] = p_.grad_lse.data == nullptr || empty_[r]
                         ? C{0}
                         : scalar<C>(p_.grad_lse, block_.batch(), block_.head(), block_.query(r));
      delta_[r] = total_[r] = left_[r] = right_[r] = 0;
      nonfinite_grad_[r] = !is_finite(grad_.get() + r * d_.pitch, d_.width);
      nonfinite_q_[r] = !is_finite(block_.q() + r * d_.pitch, d_.width);
      nonfinite_r_[r] = p_.rel_query.data == nullptr
                            ? nonfinite_q_[r]
                            : !is_finite(block_.r() + r * d_.rank_pitch, round_up(p_.rank, kLanes<C>));
      nonfinite_[r] =
          nonfinite_grad_[r] || nonfinite_q_[r] || shift_[r] - shift_[r] != C{0} || grad_lse_[r] - grad_lse_[r] != C{0};
    }
    if (scores_ || p_.grad_v.data != nullptr)
      block_.each_key_block([&](int64_t first, int64_t n) { add_values(first, n); });
    if (scores_) {
      // The rounding error of lse scales all p of a row, and their sum total_, by the same factor, down to 0 at worst.
      for (int64_t r = 0; r < rows; ++r) {
        delta_[r] = (empty_[r] || total_[r] == C{0} ? C{0} : delta_[r] / total_[r]) - grad_lse_[r];
        nonfinite_[r] = nonfinite_[r] || delta_[r] - delta_[r] != C{0};
      }
      clear(grad_q_.get(), rows * d_.pitch);
      block_.each_key_block([&](int64_t first, int64_t n) { add_keys(first, n); });
      if (sums_query_columns_) finish_columns();
      if (p_.grad_q.data != nullptr) write_queries();
    }
    if (p_.value_conv.data == nullptr) return;
    // Summed per block first, which rounds less than one long sum.
    if (value_conv_ != nullptr) clear(taps_.get(), p_.window() * d_.width);
    for (int64_t r = 0; r < rows; ++r) add_taps(r);
    if (value_conv_ != nullptr) add_to(value_conv_, taps_.get(), p_.window() * d_.width);
  }

  bool sees(int64_t r, int64_t j) const { return !empty_[r] && block_.sees(r, j); }

  // Whether something in these rows or keys is not finite, so that hidden pairs are to be cleared.
  bool selects(int64_t first, int64_t n) const {
    return any(nonfinite_, block_.rows()) || keys_.k.has_nonfinite(first, n) || keys_.v.has_nonfinite(first, n);
  }

  // Where p and dP of a block of keys begin.
  int64_t tile(int64_t first) const { return (first - block_.first_key()) / kKeyColumns * kTileSize; }

  // Finds p and dP, adds to delta and to d(v).
  void add_values(int64_t first, int64_t n) {
    constexpr int64_t S = kScorePitch<C>;
    const int64_t rows = block_.rows();
    C* const p = p_rows_.get() + (scores_ ? tile(first) : 0);
    block_.multiply_keys(first, n, p);
    if (scores_) keys_.v.dot_rows(first, n, rows, grad_.get(), ds_rows_.get() + tile(first));
    const bool careful = selects(first, n);
    for (int64_t r = 0; r < rows; ++r) weigh(r, first, n, p + r * S, careful);
    if (p_.grad_v.data == nullptr) return;
    const C* const weights = p_.dropout > 0.0 ? dropped_.get() : p;
    multiply_visible(n, d_.width, rows, Factor<C>{weights, 1, S}, grad_.get(), d_.pitch, nonfinite_grad_, clean_.get(),
                     grad_v_ + first * d_.pitch, [&](int64_t j, int64_t r) { return sees(r, first + j); });
  }

  // Leaves p, p after dropout, and dP.
  void weigh(int64_t r, int64_t first, int64_t n, C* p_row, bool careful) {
    constexpr int V = kLanes<C>;
    const PendingBias<C> pending = block_.finish(r, block_.span(r, first, n), first, n, p_row);
    exponentials(p_row, n, pending, shift_[r]);
    if (careful) hide(r, first, n, p_row);
    C* const dropped = p_.dropout > 0.0 ? dropped_.get() + r * kScorePitch<C> : nullptr;
    if (dropped != nullptr) block_.draw_keep(r, first, n, dropped);
    C* const dp = scores_ ? ds_rows_.get() + tile(first) + r * kScorePitch<C> : nullptr;
    if (dropped != nullptr) {
      for (int64_t j = 0; j < n; j += V) {
        const Vec<C> keep = load_bytes<Vec<C>>(dropped + j);
        store_bytes(dropped + j, load_bytes<Vec<C>>(p_row + j) * keep);
        if (dp != nullptr) store_bytes(dp + j, load_bytes<Vec<C>>(dp + j) * keep);
      }
    }
    if (dp == nullptr) return;
    if (careful) hide(r, first, n, dp);
    C product = dot(p_row, dp, n);
    if (!careful && product - product != C{0}) {  // a hidden pair's dP may be beyond all numbers, and its p 0
      hide(r, first, n, dp);
      product = dot(p_row, dp, n);
    }
    total_[r] += sum(p_row, n);
    delta_[r] += product;
  }

  // Clears what a row of a block of keys does not see.
  void hide(int64_t r, int64_t first, int64_t n, C* row) const {
    for (int64_t j = 0; j < n; ++j)
      if (!sees(r, first + j) || !d_.is_real(block_.batch(), first + j)) row[j] = 0;
  }

  // From p and dP to the gradients of the scores, and to all that follow from them.
  void add_keys(int64_t first, int64_t n) {
    constexpr int64_t S = kScorePitch<C>;
    const int64_t rows = block_.rows();
    C* const ds = ds_rows_.get() + tile(first);
    const bool careful = selects(first, n);
    for (int64_t r = 0; r < rows; ++r) differentiate(r, first, n, ds + r * S, careful);
    if (sums_key_columns_) block_.each_run([&](int64_t from, int64_t to) { add_near(from, to, first, n, ds); });
    if (!p_.qk) return;
    if (p_.grad_k.data != nullptr)
      multiply_visible(n, d_.width, rows, Factor<C>{ds, 1, S}, block_.q(), d_.pitch, nonfinite_q_, clean_.get(),
                       grad_k_ + first * d_.pitch, [&](int64_t j, int64_t r) { return sees(r, first + j); });
    if (p_.grad_q.data != nullptr)
      multiply_visible(rows, d_.width, n, Factor<C>{ds, S, 1}, keys_.k.row(first), d_.pitch, keys_.k.nonfinite(first),
                       clean_.get(), grad_q_.get(), [&](int64_t r, int64_t j) { return sees(r, first + j); });
  }

  void differentiate(int64_t r, int64_t first, int64_t n, C* ds_row, bool careful) {
    constexpr int V = kLanes<C>;
    const C* const p_row = p_rows_.get() + tile(first) + r * kScorePitch<C>;
    const Vec<C> delta = splat(delta_[r]);
    for (int64_t j = 0; j < n; j += V)
      store_bytes(ds_row + j, load_bytes<Vec<C>>(p_row + j) * (load_bytes<Vec<C>>(ds_row + j) - delta));
    if (careful) hide(r, first, n, ds_row);
    if (!d_.clips) return;
    const RowSpan span = block_.span(r, first, n);
    left_[r] += sum(ds_row + span.first, span.window_first - span.first);
    right_[r] += sum(ds_row + span.window_end, span.end - span.window_end);
    if (sums_key_columns_) accumulate_edges(span, first, ds_row);
  }

  // Adds the gradients of scores outside the window of a row to those of the outermost columns.
  void accumulate_edges(const RowSpan& span, int64_t first, const C* row) {
    C* const edges = key_edges_.get() + first;
    add_to(edges + span.first, row + span.first, span.window_first - span.first);
    add_to(edges + d_.padded + span.window_end, row + span.window_end, span.end - span.window_end);
  }

  // The gradients of the term of the keys within the window of queries from .. to of one sequence.
  void add_near(int64_t from, int64_t to, int64_t first, int64_t n, const C* ds) {
    constexpr int V = kLanes<C>;
    block_.each_near(from, to, first, n, [&](int64_t key, int64_t count, Range rows, int64_t low, Range overlap) {
      clear(near_.get(), count * kNearPitch<C>);
      RowSpan spans[kQueryRows];
      for (int64_t r = rows.first; r < rows.end; ++r) spans[r] = block_.span(r, first, n);
      block_.each_square(key, count, rows, low, [&](int64_t r, int64_t j, int64_t near) CK_INLINE_LAMBDA {
        Vec<C> square[V];
        CK_UNROLL for (int i = 0; i < V; ++i) {
          square[i] = Vec<C>{};
          if (r + i < rows.end)
            square[i] =
                block_.within(spans[r + i], j - first, load_bytes<Vec<C>>(ds + (r + i) * kScorePitch<C> + j - first));
        }
        transpose<C>(square);
        CK_UNROLL for (int i = 0; i < V; ++i) store_bytes(near_.get() + near + i * (kNearPitch<C> - 1), square[i]);
      });
      const C* const weights = near_.get() + overlap.first - low;
      const int64_t columns = overlap.end - overlap.first;
      if (key_rel_ != nullptr)
        multiply_transposed(p_.channels, columns, count, keys_.k.row(key), d_.pitch, keys_.k.nonfinite(key),
                            clean_.get(), weights, kNearPitch<C>, tables_->key_rel.from(key_rel_, overlap.first));
      if (p_.grad_k.data != nullptr)
        multiply<true>(count, d_.width, min(columns, p_.window() - overlap.first), Factor<C>{weights, kNearPitch<C>, 1},
                       keys_.tables.key_columns.from(overlap.first, 0), Vectors<C>{grad_k_ + key * d_.pitch, d_.pitch});
    });
  }

  // The gradients of the scores of a row in n columns from `first` on.
  CK_INLINE void read_columns(int64_t r, int64_t first, int64_t n, C* to) const {
    const QueryPosition& at = block_.position(r);
    const C* const row = ds_rows_.get() + r * kScorePitch<C>;
    // Positions among the keys of the block; that of the first column.
    const int64_t start = at.at - p_.left + first - block_.first_key();
    const int64_t begin = max(start, at.visible.first - block_.first_key());
    const int64_t end = min(start + min(n, p_.window() - first), at.visible.end - block_.first_key());
    const int64_t position = begin % kKeyColumns;
    if (end - begin == kStrip && position + kStrip <= kKeyColumns) {  // mostly
      memcpy(static_cast<void*>(to), row + begin / kKeyColumns * kTileSize + position, kStrip * sizeof(C));
    } else {
      clear(to, n);
      for (int64_t j = begin; j < end; ++j) to[j - start] = row[j / kKeyColumns * kTileSize + j % kKeyColumns];
    }
    if (first == 0) to[0] += left_[r];
    if (first + n >= p_.window()) to[p_.window() - 1 - first] += right_[r];
  }

  // What follows from the gradients of the scores by columns, a strip of them at a time.
  void finish_columns() {
    const int64_t rows = block_.rows(), rank = round_up(p_.rank, kLanes<C>);
    clear(rel_.get(), rows * rank);
    block_.each_strip([&](int64_t column, int64_t n, Range overlap) {
      for (int64_t r = overlap.first; r < overlap.end; ++r) {
        C* const row = strip_.get() + (r - overlap.first) * kStrip;
        read_columns(r, column, n, row);
        if (bias_ != nullptr) add_to(bias_ + column, row, n);
      }
      if (query_rel_ != nullptr)
        multiply_transposed(p_.rank, n, overlap.end - overlap.first, block_.r() + overlap.first * d_.rank_pitch,
                            d_.rank_pitch, nonfinite_r_ + overlap.first, clean_.get(), strip_.get(), kStrip,
                            tables_->query_rel.from(query_rel_, column));
      if (p_.query_rel.data != nullptr)
        multiply<true>(overlap.end - overlap.first, rank, min(n, p_.window() - column),
                       Factor<C>{strip_.get(), kStrip, 1}, keys_.tables.query_columns.from(column, 0),
                       Vectors<C>{rel_.get() + overlap.first * rank, rank});
    });
    if (p_.grad_rel_query.data != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        write_row(p_, p_.grad_rel_query, block_.batch(), block_.query(r), block_.head(), p_.rank,
                  rel_.get() + r * rank);
  }

  void finish_edges() {
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t column = (1 - side) * (p_.window() - 1);
      for (int64_t j = 0; j < p_.keys; ++j) {
        const C edge = key_edges_[side * d_.padded + j];
        if (edge == C{0}) continue;  // the key is hidden from all queries, and may hold NaN
        if (key_rel_ != nullptr)
          for (int64_t i = 0; i < p_.channels; ++i)
            key_rel_[tables_->key_rel.layout.at(i, column)] += keys_.k.row(j)[i] * edge;
        if (p_.grad_k.data != nullptr)
          add_to(grad_k_ + j * d_.pitch, &keys_.tables.key_columns.at(column, 0), d_.width, edge);
      }
    }
  }

  void write_queries() {
    const bool shared = p_.query_rel.data != nullptr && p_.rel_query.data == nullptr;
    for (int64_t r = 0; r < block_.rows(); ++r) {
      C* const row = grad_q_.get() + r * d_.pitch;
      multiply_by(row, d_.width, static_cast<C>(p_.scale));
      if (shared) add_to(row, rel_.get() + r * round_up(p_.rank, kLanes<C>), d_.width);
      write_row(p_, p_.grad_q, block_.batch(), block_.query(r), block_.head(), p_.channels, row);
    }
  }

  // The gradients of the depthwise term: of its tables, and of its values.
  void add_taps(int64_t r) {
    const QueryPosition& position = block_.position(r);
    C* const grad = grad_.get() + r * d_.pitch;
    if (value_conv_scale_ != nullptr) {
      keys_.convolve(position, row_.get());
      *value_conv_scale_ += dot(grad, row_.get(), d_.width);
    }
    multiply_by(grad, d_.width, keys_.tables.conv_scale());
    if (value_conv_bias_ != nullptr) add_to(value_conv_bias_, grad, d_.width);
    const Range taps = position.taps(p_);
    for (int64_t c = taps.first; c < taps.end; ++c) {
      const int64_t j = position.at - p_.left + c;
      if (!d_.is_real(block_.batch(), j)) continue;
      d_.multiply_add(grad_v_ + j * d_.pitch, grad, keys_.tables.value_conv.get() + c * d_.width);
      if (value_conv_ != nullptr) d_.multiply_add(taps_.get() + c * d_.width, grad, keys_.v.row(j));
    }
  }

  const AttentionBackward& p_;
  const AttentionData<C>& d_;
  const bool scores_, sums_query_columns_, sums_key_columns_;
  Keys<C> keys_;
  QueryBlock<C> block_;
  const GradientTables<C>* tables_ = nullptr;
  C *grad_k_ = nullptr, *grad_v_ = nullptr;
  Scratch<C> grad_, p_rows_, ds_rows_, dropped_, clean_, grad_q_, strip_, rel_, row_, taps_, near_, key_edges_;
  C shift_[kQueryRows], grad_lse_[kQueryRows], total_[kQueryRows], delta_[kQueryRows];
  C left_[kQueryRows], right_[kQueryRows];  // the gradients of scores left and right of the window
  // of queries: lse is -inf; something of a row is not finite
  bool empty_[kQueryRows], nonfinite_[kQueryRows], nonfinite_grad_[kQueryRows], nonfinite_q_[kQueryRows],
      nonfinite_r_[kQueryRows];
  C *bias_ = nullptr, *query_rel_ = nullptr, *key_rel_ = nullptr, *value_conv_ = nullptr, *value_conv_bias_ = nullptr,
    *value_conv_scale_ = nullptr;
};

template <class C>
inline const char* attention_backward_typed(const AttentionBackward& p) {
  const AttentionData<C> data(p);
  const GradientTables<C> tables(p);
  // Each part packs the keys again, and has sums for all of them; so they are few, however long the sequence.
  const Splits splits(p.batch * p.groups, p.sharing() * data.blocks(), min(32, 4 * p.batch * p.groups), 2);
  const int64_t tasks = splits.tasks(), half = data.padded * data.pitch;
  const OrderedSums<C> key_sums(tasks, splits.per_group, 2 * half, false);
  const OrderedSums<C> table_sums(tasks, p.batch * splits.per_group, p.sharing() * tables.size, tables.shared);
  const auto write_tables = [&](int64_t g, C* sums) {
    tables.write({g * p.sharing(), (g + 1) * p.sharing()},
                 [&](int64_t h) { return sums + h % p.sharing() * tables.size; });
  };
  parallel(p, tasks, data.threads, [&](int64_t begin, int64_t end) {
    AttentionBackwardTask<C> task(p, data);
    typename OrderedSums<C>::Runner keys(key_sums, begin, end), columns(table_sums, begin, end);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pair = n / splits.per_group, b = pair % p.batch, g = pair / p.batch;
      C* const key_sum = keys.open(n);
      task.run(b, g, splits.of(n), tables, columns.open(n), key_sum);
      if (C* const sum = keys.close(n))
        for (int64_t j = 0; j < p.keys; ++j)
          write_key(p, data, b, g, j, sum + j * data.pitch, sum + half + j * data.pitch);
      if (C* const sums = columns.close(n)) write_tables(g, sums);
    }
  });
  parallel(p, splits.groups * p.keys, data.threads && splits.per_group > 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pair = n / p.keys, j = n % p.keys, at = j * data.pitch;
      if (C* const row = key_sums.remaining(pair, at, data.width))
        write_key(p, data, pair % p.batch, pair / p.batch, j, row, key_sums.remaining(pair, half + at, data.width));
    }
  });
  if (tasks == 0) {
    const Scratch<C> none(tables.size);
    clear(none.get(), tables.size);
    tables.write({0, p.heads}, [&](int64_t) { return none.get(); });
  } else if (tables.shared) {
    for (int64_t g = 0; g < p.groups; ++g) table_sums.remaining(g, 0, p.sharing() * tables.size);
    tables.write({0, p.heads}, [&](int64_t h) {
      return table_sums.remaining(h / p.sharing(), 0, 0) + h % p.sharing() * tables.size;
    });
  } else {
    for (int64_t g = 0; g < p.groups; ++g)
      if (C* const sums = table_sums.remaining(g, 0, p.sharing() * tables.size)) write_tables(g, sums);
  }
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
