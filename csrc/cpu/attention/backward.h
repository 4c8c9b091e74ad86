// The backward pass. A task owns the keys and values of one group of heads, or a part of their queries: blocks of queries
// walk over the keys, find the probabilities again from lse, and add to d(k) and d(v), which the task keeps for all
// keys, to d(q), which they keep for themselves, and to the tables.
//
// With dP the gradient of p, the gradient of a score is p (dP - delta), where delta = sum of p dP over the row, less
// grad_lse. That is also grad * out over the channels, but out has been rounded, and holds the depthwise term: what it
// lost would reach every gradient of the row, and a table's column that sums over far keys would gather it. So a block
// keeps p and dP of all the keys it sees until their sum is known.
#pragma once

#include "csrc/cpu/attention/sums.h"

namespace ck::cpu::CK_ISA {

// Tables of one group of heads, each head's after the other.
template <class C>
struct GradientTables {
  using L = Layout<C>;

  TableSums<C> bias, query_rel, key_rel, value_conv, value_conv_bias, value_conv_scale;
  int64_t size = 0;  // of one head
  bool shared = false;

  explicit GradientTables(const AttentionBackward& p)
      : bias{p.bias, p.grad_bias, L::rows({1, 0}, {p.window(), 1}), 1},
        query_rel{p.query_rel, p.grad_query_rel, L::panels({p.rank, p.window()}, {p.window(), 1}),
                  static_cast<C>(p.rel_scale)},
        key_rel{p.key_rel, p.grad_key_rel, L::panels({p.channels, p.window()}, {p.window(), 1}),
                static_cast<C>(p.scale)},
        value_conv{p.value_conv, p.grad_value_conv, L::rows({p.window(), 1}, {p.channels, p.window()}), 1},
        value_conv_bias{p.value_conv_bias, p.grad_value_conv_bias, L::rows({1, 0}, {p.channels, 1}), 1},
        value_conv_scale{p.value_conv_scale, p.grad_value_conv_scale, L::rows({1, 0}, {1, 1}), 1} {
    for (TableSums<C>* table : {&bias, &query_rel, &key_rel, &value_conv, &value_conv_bias, &value_conv_scale}) {
      table->start = size;
      size += table->size();
      shared = shared || table->shared();
    }
  }

  template <class Heads>
  void write(Range range, const Heads& heads) const {
    for (const TableSums<C>* table : {&bias, &query_rel, &key_rel, &value_conv, &value_conv_bias, &value_conv_scale})
      table->write(range, heads);
  }
};

template <class C>
class GradientTask {
 public:
  GradientTask(const AttentionBackward& p, const AttentionData<C>& data)
      : p_(p),
        d_(data),
        scores_(needs_scores(p)),
        folds_(scores_ && p.has_query_columns()),
        folds_keys_(scores_ && p.key_rel.data != nullptr),
        keys_(data, true),
        block_(data, keys_),
        grad_(kQueryRows * data.pitch),
        p_rows_((scores_ ? tiles(data) : 1) * kTileSize),
        ds_rows_(scores_ ? tiles(data) * kTileSize : 0),
        dropped_(p.dropout > 0.0 ? kTileSize : 0),
        clean_(most(kQueryRows, kKeyColumns) * most(data.pitch, data.rank_pitch)),
        grad_q_(kQueryRows * data.pitch),
        strip_(folds_ ? kQueryRows * kStrip : 0),
        rel_(folds_ ? kQueryRows * round_up(p.rank, kLanes<C>) : 0),
        row_(data.width),
        taps_(p.grad_value_conv != nullptr ? p.window() * data.width : 0),
        near_(folds_keys_ ? kNearKeys * kNearPitch<C> : 0),
        key_edges_(folds_keys_ ? 2 * data.padded : 0) {}

  // Blocks `range` of the heads of one group, which follow each other. keys: d(k) before its scale and d(v) of the
  // group, rows of `pitch`.
  void run(int64_t b, int64_t g, Range range, const GradientTables<C>& tables, C* sums, C* keys) {
    tables_ = &tables;
    own_k_ = keys;
    own_v_ = keys + d_.padded * d_.pitch;
    keys_.load(b, g);
    for (int64_t n = 0; n < p_.sharing(); ++n) {
      const int64_t first = n * d_.blocks();
      const Range blocks{most(range.first - first, 0), least(range.end - first, d_.blocks())};
      if (blocks.empty()) continue;
      keys_.choose_head(g * p_.sharing() + n);
      C* const head = sums + n * tables.size;
      bias_ = tables.bias.of(head);
      query_rel_ = tables.query_rel.of(head);
      key_rel_ = tables.key_rel.of(head);
      value_conv_ = tables.value_conv.of(head);
      value_conv_bias_ = tables.value_conv_bias.of(head);
      value_conv_scale_ = tables.value_conv_scale.of(head);
      if (folds_keys_) clear(key_edges_.get(), 2 * d_.padded);
      for (int64_t block = blocks.first; block < blocks.end; ++block) run_block(block);
      if (folds_keys_ && d_.clips) finish_edges();
    }
  }

 private:
  static constexpr int64_t kTileSize = kQueryRows * kScorePitch<C>, kStrip = QueryBlock<C>::kStrip;
  // Blocks of keys that one block of queries may see.
  static int64_t tiles(const AttentionData<C>& d) { return ceil_div(d.places.most_seen() + kPanel<C>, kKeyColumns); }

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
      // What merges the results of several calls hands NaN to a row of -inf, which sees nothing.
      blind_[r] = lse == static_cast<C>(-__builtin_inf());
      grad_lse_[r] = p_.grad_lse.data == nullptr || blind_[r]
                         ? C{0}
                         : scalar<C>(p_.grad_lse, block_.batch(), block_.head(), block_.query(r));
      delta_[r] = total_[r] = left_[r] = right_[r] = 0;
      odd_grad_[r] = !is_finite(grad_.get() + r * d_.pitch, d_.width);
      odd_q_[r] = !is_finite(block_.q() + r * d_.pitch, d_.width);
      odd_r_[r] = p_.rel_query.data == nullptr
                      ? odd_q_[r]
                      : !is_finite(block_.r() + r * d_.rank_pitch, round_up(p_.rank, kLanes<C>));
      odd_[r] = odd_grad_[r] || odd_q_[r] || shift_[r] - shift_[r] != C{0} || grad_lse_[r] - grad_lse_[r] != C{0};
    }
    if (scores_ || p_.grad_v.data != nullptr)
      block_.each_key_block([&](int64_t first, int64_t n) { add_values(first, n); });
    if (scores_) {
      // What lse has lost to rounding is in all p of a row alike, and in total.
      for (int64_t r = 0; r < rows; ++r) {
        delta_[r] = (blind_[r] ? C{0} : delta_[r] / total_[r]) - grad_lse_[r];
        odd_[r] = odd_[r] || delta_[r] - delta_[r] != C{0};
      }
      clear(grad_q_.get(), rows * d_.pitch);
      block_.each_key_block([&](int64_t first, int64_t n) { add_keys(first, n); });
      if (folds_) finish_columns();
      if (p_.grad_q.data != nullptr) write_queries();
    }
    if (p_.value_conv.data == nullptr) return;
    // Summed by blocks first: fewer roundings meet in one sum.
    if (value_conv_ != nullptr) clear(taps_.get(), p_.window() * d_.width);
    for (int64_t r = 0; r < rows; ++r) add_taps(r);
    if (value_conv_ != nullptr) add_to(value_conv_, taps_.get(), p_.window() * d_.width);
  }

  bool sees(int64_t r, int64_t j) const { return !blind_[r] && block_.sees(r, j); }

  // Whether something in these rows or keys is not finite, so that hidden pairs are to be cleared.
  bool selects(int64_t first, int64_t n) const {
    return any(odd_, block_.rows()) || keys_.k.has_odd(first, n) || keys_.v.has_odd(first, n);
  }

  // The places of p and dP of a block of keys.
  int64_t tile(int64_t first) const { return (first - block_.first_key()) / kKeyColumns * kTileSize; }

  // Finds p and dP, adds to delta and to d(v).
  void add_values(int64_t first, int64_t n) {
    constexpr int64_t S = kScorePitch<C>;
    const int64_t rows = block_.rows();
    C* const p = p_rows_.get() + (scores_ ? tile(first) : 0);
    block_.multiply_keys(first, n, p);
    if (scores_) keys_.v.meet(first, n, rows, grad_.get(), ds_rows_.get() + tile(first));
    const bool careful = selects(first, n);
    for (int64_t r = 0; r < rows; ++r) weigh(r, first, n, p + r * S, careful);
    if (p_.grad_v.data == nullptr) return;
    const C* const weights = p_.dropout > 0.0 ? dropped_.get() : p;
    multiply_seen(n, d_.width, rows, Factor<C>{weights, 1, S}, grad_.get(), d_.pitch, odd_grad_, clean_.get(),
                  own_v_ + first * d_.pitch, [&](int64_t j, int64_t r) { return sees(r, first + j); });
  }

  // Leaves p, p after dropout, and dP.
  void weigh(int64_t r, int64_t first, int64_t n, C* p_row, bool careful) {
    constexpr int V = kLanes<C>;
    const Rest<C> rest = block_.finish(r, block_.cut(r, first, n), first, n, p_row);
    exponentials(p_row, n, rest, shift_[r]);
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
    if (folds_keys_) block_.each_run([&](int64_t from, int64_t to) { add_near(from, to, first, n, ds); });
    if (!p_.qk) return;
    if (p_.grad_k.data != nullptr)
      multiply_seen(n, d_.width, rows, Factor<C>{ds, 1, S}, block_.q(), d_.pitch, odd_q_, clean_.get(),
                    own_k_ + first * d_.pitch, [&](int64_t j, int64_t r) { return sees(r, first + j); });
    if (p_.grad_q.data != nullptr)
      multiply_seen(rows, d_.width, n, Factor<C>{ds, S, 1}, keys_.k.row(first), d_.pitch, keys_.k.odd(first),
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
    const Cut cut = block_.cut(r, first, n);
    left_[r] += sum(ds_row + cut.first, cut.window - cut.first);
    right_[r] += sum(ds_row + cut.beyond, cut.end - cut.beyond);
    if (folds_keys_) fold_edges(cut, first, ds_row);
  }

  // What keys outside the window of a row pass on to the outermost columns.
  void fold_edges(const Cut& cut, int64_t first, const C* row) {
    C* const edges = key_edges_.get() + first;
    add_to(edges + cut.first, row + cut.first, cut.window - cut.first);
    add_to(edges + d_.padded + cut.beyond, row + cut.beyond, cut.end - cut.beyond);
  }

  // The gradients of the term of the keys within the window of queries from .. to of one sequence.
  void add_near(int64_t from, int64_t to, int64_t first, int64_t n, const C* ds) {
    constexpr int V = kLanes<C>;
    block_.each_near(from, to, first, n, [&](int64_t key, int64_t count, Range rows, int64_t low, Range met) {
      clear(near_.get(), count * kNearPitch<C>);
      Cut cuts[kQueryRows];
      for (int64_t r = rows.first; r < rows.end; ++r) cuts[r] = block_.cut(r, first, n);
      block_.each_square(key, count, rows, low, [&](int64_t r, int64_t j, int64_t near) CK_INLINE_LAMBDA {
        Vec<C> square[V];
        CK_UNROLL for (int i = 0; i < V; ++i) {
          square[i] = Vec<C>{};
          if (r + i < rows.end)
            square[i] =
                block_.within(cuts[r + i], j - first, load_bytes<Vec<C>>(ds + (r + i) * kScorePitch<C> + j - first));
        }
        transpose<C>(square);
        CK_UNROLL for (int i = 0; i < V; ++i) store_bytes(near_.get() + near + i * (kNearPitch<C> - 1), square[i]);
      });
      const C* const weights = near_.get() + met.first - low;
      const int64_t columns = met.end - met.first;
      if (key_rel_ != nullptr)
        multiply_met(p_.channels, columns, count, keys_.k.row(key), d_.pitch, keys_.k.odd(key), clean_.get(), weights,
                     kNearPitch<C>, tables_->key_rel.from(key_rel_, met.first));
      if (p_.grad_k.data != nullptr)
        multiply<true>(count, d_.width, least(columns, p_.window() - met.first), Factor<C>{weights, kNearPitch<C>, 1},
                       keys_.tables.key_columns.from(met.first, 0), Vectors<C>{own_k_ + key * d_.pitch, d_.pitch});
    });
  }

  // The gradients of the scores of a row in n columns from `first` on.
  CK_INLINE void read_columns(int64_t r, int64_t first, int64_t n, C* to) const {
    const Place& at = block_.place(r);
    const C* const row = ds_rows_.get() + r * kScorePitch<C>;
    // Positions among the keys of the block; that of the first column.
    const int64_t start = at.at - p_.left + first - block_.first_key();
    const int64_t begin = most(start, at.visible.first - block_.first_key());
    const int64_t end = least(start + least(n, p_.window() - first), at.visible.end - block_.first_key());
    const int64_t place = begin % kKeyColumns;
    if (end - begin == kStrip && place + kStrip <= kKeyColumns) {  // mostly
      memcpy(static_cast<void*>(to), row + begin / kKeyColumns * kTileSize + place, kStrip * sizeof(C));
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
    block_.each_strip([&](int64_t column, int64_t n, Range met) {
      for (int64_t r = met.first; r < met.end; ++r) {
        C* const row = strip_.get() + (r - met.first) * kStrip;
        read_columns(r, column, n, row);
        if (bias_ != nullptr) add_to(bias_ + column, row, n);
      }
      if (query_rel_ != nullptr)
        multiply_met(p_.rank, n, met.end - met.first, block_.r() + met.first * d_.rank_pitch, d_.rank_pitch,
                     odd_r_ + met.first, clean_.get(), strip_.get(), kStrip,
                     tables_->query_rel.from(query_rel_, column));
      if (p_.query_rel.data != nullptr)
        multiply<true>(met.end - met.first, rank, least(n, p_.window() - column), Factor<C>{strip_.get(), kStrip, 1},
                       keys_.tables.query_columns.from(column, 0), Vectors<C>{rel_.get() + met.first * rank, rank});
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
        if (edge == C{0}) continue;  // nothing that a key which nobody sees may spoil
        if (key_rel_ != nullptr)
          for (int64_t i = 0; i < p_.channels; ++i)
            key_rel_[tables_->key_rel.layout.at(i, column)] += keys_.k.row(j)[i] * edge;
        if (p_.grad_k.data != nullptr)
          add_to(own_k_ + j * d_.pitch, &keys_.tables.key_columns.at(column, 0), d_.width, edge);
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

  // The depthwise term: its tables, and what it passes on to its values.
  void add_taps(int64_t r) {
    const Place& place = block_.place(r);
    C* const grad = grad_.get() + r * d_.pitch;
    if (value_conv_scale_ != nullptr) {
      keys_.convolve(place, row_.get());
      *value_conv_scale_ += dot(grad, row_.get(), d_.width);
    }
    multiply_by(grad, d_.width, keys_.tables.conv_scale());
    if (value_conv_bias_ != nullptr) add_to(value_conv_bias_, grad, d_.width);
    const Range taps = place.taps(p_);
    for (int64_t c = taps.first; c < taps.end; ++c) {
      const int64_t j = place.at - p_.left + c;
      if (!d_.is_real(block_.batch(), j)) continue;
      d_.multiply_add(own_v_ + j * d_.pitch, grad, keys_.tables.value_conv.get() + c * d_.width);
      if (value_conv_ != nullptr) d_.multiply_add(taps_.get() + c * d_.width, grad, keys_.v.row(j));
    }
  }

  const AttentionBackward& p_;
  const AttentionData<C>& d_;
  const bool scores_, folds_, folds_keys_;
  Keys<C> keys_;
  QueryBlock<C> block_;
  const GradientTables<C>* tables_ = nullptr;
  C *own_k_ = nullptr, *own_v_ = nullptr;
  Scratch<C> grad_, p_rows_, ds_rows_, dropped_, clean_, grad_q_, strip_, rel_, row_, taps_, near_, key_edges_;
  C shift_[kQueryRows], grad_lse_[kQueryRows], total_[kQueryRows], delta_[kQueryRows];
  C left_[kQueryRows], right_[kQueryRows];  // the gradients of scores left and right of the window
  // of queries: lse is -inf; something of a row is not finite
  bool blind_[kQueryRows], odd_[kQueryRows], odd_grad_[kQueryRows], odd_q_[kQueryRows], odd_r_[kQueryRows];
  C *bias_ = nullptr, *query_rel_ = nullptr, *key_rel_ = nullptr, *value_conv_ = nullptr, *value_conv_bias_ = nullptr,
    *value_conv_scale_ = nullptr;
};

// Row j of d(k) and d(v) of one group. Keys that the mask hides have none.
template <class C>
inline void write_key(const AttentionBackward& p, const AttentionData<C>& d, int64_t b, int64_t g, int64_t j, C* grad_k,
                      C* grad_v) {
  multiply_by(grad_k, d.width, static_cast<C>(p.scale));
  for (C* row : {grad_k, grad_v}) {
    const HeadRows& to = row == grad_k ? p.grad_k : p.grad_v;
    if (to.data == nullptr) continue;
    if (!d.is_real(b, j)) clear(row, d.width);
    write_row(p, to, b, j, g, p.channels, row);
  }
}

template <class C>
inline const char* attention_backward_typed(const AttentionBackward& p) {
  const AttentionData<C> data(p);
  const GradientTables<C> tables(p);
  // Each part packs the keys again, and has sums for all of them; so they are few, however long the sequence.
  const Parts parts(p.batch * p.groups, p.sharing() * data.blocks(), least(32, 4 * p.batch * p.groups), 2);
  const int64_t tasks = parts.tasks(), half = data.padded * data.pitch;
  const OrderedSums<C> key_sums(tasks, parts.parts, 2 * half, false);
  const OrderedSums<C> table_sums(tasks, p.batch * parts.parts, p.sharing() * tables.size, tables.shared);
  const auto write_tables = [&](int64_t g, C* sums) {
    tables.write({g * p.sharing(), (g + 1) * p.sharing()},
                 [&](int64_t h) { return sums + h % p.sharing() * tables.size; });
  };
  parallel(p, tasks, data.threads, [&](int64_t begin, int64_t end) {
    GradientTask<C> task(p, data);
    typename OrderedSums<C>::Runner keys(key_sums, begin, end), columns(table_sums, begin, end);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t unit = n / parts.parts, b = unit % p.batch, g = unit / p.batch;
      C* const own_keys = keys.open(n);
      task.run(b, g, parts.of(n), tables, columns.open(n), own_keys);
      if (C* const sum = keys.close(n))
        for (int64_t j = 0; j < p.keys; ++j)
          write_key(p, data, b, g, j, sum + j * data.pitch, sum + half + j * data.pitch);
      if (C* const sums = columns.close(n)) write_tables(g, sums);
    }
  });
  parallel(p, parts.units * p.keys, data.threads && parts.parts > 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t unit = n / p.keys, j = n % p.keys, at = j * data.pitch;
      if (C* const row = key_sums.rest(unit, at, data.width))
        write_key(p, data, unit % p.batch, unit / p.batch, j, row, key_sums.rest(unit, half + at, data.width));
    }
  });
  if (tasks == 0) {
    const Scratch<C> none(tables.size);
    clear(none.get(), tables.size);
    tables.write({0, p.heads}, [&](int64_t) { return none.get(); });
  } else if (tables.shared) {
    for (int64_t g = 0; g < p.groups; ++g) table_sums.rest(g, 0, p.sharing() * tables.size);
    tables.write({0, p.heads},
                 [&](int64_t h) { return table_sums.rest(h / p.sharing(), 0, 0) + h % p.sharing() * tables.size; });
  } else {
    for (int64_t g = 0; g < p.groups; ++g)
      if (C* const sums = table_sums.rest(g, 0, p.sharing() * tables.size)) write_tables(g, sums);
  }
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
