// attention_grad, in one pass. A task owns the keys and values of one group of heads, or a part of their queries:
// blocks of queries walk over the keys, find the probabilities again from lse, and add to d(k) and d(v), which the task
// keeps for all keys, to d(q), which they keep for themselves, and to the tables.
//
// With dP the gradient of p, the gradient of a score is p (dP - delta), where delta = sum of p dP over the row, less
// grad_lse. The sum is that of grad * out over the channels, once the depthwise term is taken out of out. It is off by
// the rounding of out, and so is the gradient of each score of the row, by p times that. A table's column that sums
// over far keys would gather it; so the columns of p are summed too and take it out again: the gradients of a row's
// scores must sum to grad_lse.
#pragma once

#include "attention_sums.h"

namespace ck::cpu::CK_ISA {

template <class C>
struct GradientSums {
  TableSums<C> bias, query_rel, key_rel, value_conv, value_conv_bias, value_conv_scale;

  GradientSums(const AttentionBackward& p, const AttentionData<C>& d, const Parts& parts)
      : bias(p.grad_bias != nullptr, parts, p.sharing(), 1, d.window_pitch),
        query_rel(p.grad_query_rel != nullptr, parts, p.sharing(), p.rank, d.window_pitch),
        key_rel(p.grad_key_rel != nullptr, parts, p.sharing(), p.channels, d.window_pitch),
        value_conv(p.grad_value_conv != nullptr, parts, p.sharing(), p.window(), d.width),
        value_conv_bias(p.grad_value_conv_bias != nullptr, parts, p.sharing(), 1, d.width),
        value_conv_scale(p.grad_value_conv_scale != nullptr, parts, p.sharing(), 1, 1) {}

  void open(int64_t task) const {
    for (const TableSums<C>* table : {&bias, &query_rel, &key_rel, &value_conv, &value_conv_bias, &value_conv_scale})
      table->open(task);
  }

  void finish(const AttentionBackward& p, const AttentionData<C>& d) const {
    const Axis columns{p.window(), 1}, one{1, 0}, taps{p.window(), d.width}, channels{p.channels, 1};
    bias.finish(p, p.bias, p.grad_bias, 0, one, columns, 1);
    query_rel.finish(p, p.query_rel, p.grad_query_rel, 0, {p.rank, d.window_pitch}, columns,
                     static_cast<C>(p.rel_scale));
    // Column c was summed as column W-1-c, the order in which keys see queries.
    key_rel.finish(p, p.key_rel, p.grad_key_rel, p.window() - 1, {p.channels, d.window_pitch}, {p.window(), -1},
                   static_cast<C>(p.scale));
    value_conv.finish(p, p.value_conv, p.grad_value_conv, 0, channels, taps, 1);
    value_conv_bias.finish(p, p.value_conv_bias, p.grad_value_conv_bias, 0, channels, one, 1);
    value_conv_scale.finish(p, p.value_conv_scale, p.grad_value_conv_scale, 0, one, one, 1);
  }
};

// d(k) before its scale and d(v) of one group, rows of `pitch`.
template <class C>
struct KeyGradients {
  C *k, *v;
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
        p_rows_(kQueryRows * kScorePitch<C>),
        ds_rows_(scores_ ? kQueryRows * kScorePitch<C> : 0),
        keep_(p.dropout > 0.0 ? kKeyColumns : 0),
        grad_q_(kQueryRows * data.pitch),
        columns_(folds_ ? kQueryRows * data.window_pitch : 0),
        p_columns_(folds_ ? kQueryRows * data.window_pitch : 0),
        rel_(folds_ ? kQueryRows * round_up(p.rank, kLanes<C>) : 0),
        row_(data.width),
        taps_(p.grad_value_conv != nullptr ? p.window() * data.width : 0),
        key_columns_(folds_keys_ ? data.padded * data.window_pitch : 0),
        key_edges_(folds_keys_ ? 2 * data.padded : 0) {}

  // Blocks `range` of the heads of one group, which follow each other; the tables' sums are those of `task`.
  void run(int64_t b, int64_t g, Range range, const GradientSums<C>& sums, int64_t task, KeyGradients<C> own) {
    own_ = own;
    keys_.load(b, g);
    sums.open(task);
    clear(own_.k, d_.padded * d_.pitch);
    clear(own_.v, d_.padded * d_.pitch);
    for (int64_t n = 0; n < p_.sharing(); ++n) {
      const int64_t first = n * d_.blocks();
      const Range blocks{most(range.first - first, 0), least(range.end - first, d_.blocks())};
      if (blocks.empty()) continue;
      keys_.choose_head(g * p_.sharing() + n);
      bias_ = sums.bias.of(task, n);
      query_rel_ = sums.query_rel.of(task, n);
      value_conv_ = sums.value_conv.of(task, n);
      value_conv_bias_ = sums.value_conv_bias.of(task, n);
      value_conv_scale_ = sums.value_conv_scale.of(task, n);
      if (folds_keys_) {
        clear(key_columns_.get(), d_.padded * d_.window_pitch);
        clear(key_edges_.get(), 2 * d_.padded);
      }
      for (int64_t block = blocks.first; block < blocks.end; ++block) run_block(block);
      if (folds_keys_) finish_key_columns(sums.key_rel.of(task, n));
    }
  }

 private:
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
      shift_[r] = shift_of(scalar<C>(p_.lse, block_.batch(), block_.head(), block_.query(r))) * static_cast<C>(kLog2e);
      if (scores_) delta_[r] = find_delta(r);
    }
    clear(grad_q_.get(), rows * d_.pitch);
    if (folds_) {
      clear(columns_.get(), rows * d_.window_pitch);
      clear(p_columns_.get(), rows * d_.window_pitch);
      clear(excess_, kQueryRows);
    }
    if (scores_ || p_.grad_v.data != nullptr)
      block_.each_key_block([&](int64_t first, int64_t n) { add_keys(first, n); });
    if (folds_) finish_columns();
    if (p_.grad_q.data != nullptr) write_queries();
    if (p_.value_conv.data == nullptr) return;
    // Summed by blocks first: fewer roundings meet in one sum.
    if (value_conv_ != nullptr) clear(taps_.get(), p_.window() * d_.width);
    for (int64_t r = 0; r < rows; ++r) add_taps(r);
    if (value_conv_ != nullptr) add_to(value_conv_, taps_.get(), p_.window() * d_.width);
  }

  C find_delta(int64_t r) {
    const int64_t b = block_.batch(), h = block_.head(), i = block_.query(r);
    const C* const grad = grad_.get() + r * d_.pitch;
    read_row<C>(p_, p_.out, b, i, h, p_.channels, 1, row_.get());
    C delta = dot(grad, row_.get(), d_.width);
    if (p_.value_conv.data != nullptr) {
      keys_.convolve(block_.place(r), row_.get());
      delta -= dot(grad, row_.get(), d_.width) * d_.conv_scale(h);
    }
    return delta - grad_lse(r);
  }

  // A query that sees nothing has an lse of -inf, which no gradient passes.
  C grad_lse(int64_t r) const {
    const int64_t b = block_.batch(), h = block_.head(), i = block_.query(r);
    const bool sees = scalar<C>(p_.lse, b, h, i) != static_cast<C>(-__builtin_inf());
    return p_.grad_lse.data != nullptr && sees ? scalar<C>(p_.grad_lse, b, h, i) : C{0};
  }

  void add_keys(int64_t first, int64_t n) {
    constexpr int64_t S = kScorePitch<C>;
    const int64_t rows = block_.rows();
    block_.multiply_keys(first, n, p_rows_.get());
    if (scores_) keys_.v.meet(first, n, rows, grad_.get(), ds_rows_.get());
    for (int64_t r = 0; r < rows; ++r) weigh(r, first, n);
    if (p_.grad_v.data != nullptr)
      multiply<true>(n, d_.width, rows, Factor<C>{p_rows_.get(), 1, S}, grad_.get(), d_.pitch,
                     own_.v + first * d_.pitch, d_.pitch);
    if (!p_.qk) return;
    if (p_.grad_k.data != nullptr)
      multiply<true>(n, d_.width, rows, Factor<C>{ds_rows_.get(), 1, S}, block_.q(), d_.pitch,
                     own_.k + first * d_.pitch, d_.pitch);
    if (p_.grad_q.data != nullptr)
      multiply<true>(rows, d_.width, n, Factor<C>{ds_rows_.get(), S, 1}, keys_.k.row(first), d_.pitch, grad_q_.get(),
                     d_.pitch);
  }

  // Leaves p after dropout, and the gradients of the scores.
  void weigh(int64_t r, int64_t first, int64_t n) {
    constexpr int V = kLanes<C>;
    C* const p_row = p_rows_.get() + r * kScorePitch<C>;
    const Cut cut = block_.cut(r, first, n);
    const Rest<C> rest = block_.finish(r, cut, first, n, p_row);
    if (!scores_) {
      exponentials(p_row, n, rest, shift_[r]);
      if (p_.dropout > 0.0) block_.drop(r, first, n, p_row, keep_.get());
      return;
    }
    C* const ds_row = ds_rows_.get() + r * kScorePitch<C>;
    const C shift = shift_[r], delta = delta_[r];
    Vec<C> sums[3] = {}, p_sums[3] = {};  // left of the window, around it and right of it
    const auto differentiate = [&](auto drops) CK_INLINE_LAMBDA {
      each_part(rest, n, [&](int part, int64_t from, int64_t to, C constant) CK_INLINE_LAMBDA {
        Vec<C> sum = {}, p_sum = {};
        for (int64_t j = from; j < to; j += V) {
          const Vec<C> e = vexp2<C>(load_bytes<Vec<C>>(p_row + j) + (constant - shift));
          Vec<C> dp = load_bytes<Vec<C>>(ds_row + j);
          if constexpr (drops) {
            const Vec<C> keep = load_bytes<Vec<C>>(keep_.get() + j);
            dp *= keep;
            store_bytes(p_row + j, e * keep);
            store_bytes(keep_.get() + j, e);
          } else {
            store_bytes(p_row + j, e);
          }
          const Vec<C> ds = e * (dp - delta);
          store_bytes(ds_row + j, ds);
          sum += ds;
          p_sum += e;
        }
        sums[part] = sum;
        p_sums[part] = p_sum;
      });
    };
    if (p_.dropout > 0.0) {
      block_.draw_keep(r, first, n, keep_.get());
      differentiate(std::true_type());
    } else {
      differentiate(std::false_type());
    }
    if (folds_) {
      fold(columns_, r, cut, rest, first, ds_row, sums);
      fold(p_columns_, r, cut, rest, first, p_.dropout > 0.0 ? keep_.get() : p_row, p_sums);
      excess_[r] += sum_lanes<C>(sums[0] + sums[1] + sums[2]);
    }
    if (folds_keys_) fold_keys(r, cut, first, ds_row);
  }

  // Adds a row over the keys to the columns that the keys belong to. sums: of the parts of the row that `rest` makes.
  void fold(const Scratch<C>& all, int64_t r, const Cut& cut, const Rest<C>& rest, int64_t first, const C* row,
            const Vec<C> (&sums)[3]) const {
    C* const columns = all.get() + r * d_.window_pitch;
    if (cut.window < cut.beyond)
      add_to(columns + block_.column(r, first + cut.window), row + cut.window, cut.beyond - cut.window);
    if (!p_.clips()) return;
    C left = sum_lanes<C>(sums[0]), right = sum_lanes<C>(sums[2]);
    for (int64_t j = rest.begin; j < cut.window; ++j) left += row[j];
    for (int64_t j = cut.beyond; j < rest.end; ++j) right += row[j];
    columns[0] += left;
    columns[p_.window() - 1] += right;
  }

  // Adds a row over the keys to the columns of each key.
  void fold_keys(int64_t r, const Cut& cut, int64_t first, const C* row) {
    for (int64_t j = cut.window; j < cut.beyond; ++j)
      key_columns_[(first + j) * d_.window_pitch + block_.column(r, first + j)] += row[j];
    if (!p_.clips()) return;
    C* const edges = key_edges_.get() + first;
    add_to(edges + cut.first, row + cut.first, cut.window - cut.first);
    add_to(edges + d_.padded + cut.beyond, row + cut.beyond, cut.end - cut.beyond);
  }

  void finish_columns() {
    const int64_t rows = block_.rows(), pitch = d_.window_pitch;
    for (int64_t r = 0; r < rows; ++r) {
      const C excess = excess_[r] - grad_lse(r);
      add_to(columns_.get() + r * pitch, p_columns_.get() + r * pitch, pitch, -excess);
    }
    if (bias_ != nullptr)
      for (int64_t r = 0; r < rows; ++r) add_to(bias_, columns_.get() + r * pitch, pitch);
    if (query_rel_ != nullptr)
      multiply<true>(p_.rank, pitch, rows, Factor<C>{block_.r(), 1, d_.rank_pitch}, columns_.get(), pitch, query_rel_,
                     pitch);
    if (p_.query_rel.data == nullptr) return;
    const int64_t rank = d_.query_columns.pitch();
    multiply<false>(rows, rank, p_.window(), Factor<C>{columns_.get(), pitch, 1}, d_.query_columns.of(block_.head()),
                    rank, rel_.get(), rank);
    if (p_.grad_rel_query.data != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        write_row(p_, p_.grad_rel_query, block_.batch(), block_.query(r), block_.head(), p_.rank,
                  rel_.get() + r * rank);
  }

  void finish_key_columns(C* sums) {
    const int64_t pitch = d_.window_pitch, W = p_.window();
    for (int64_t j = 0; j < d_.padded; ++j) {
      key_columns_[j * pitch] += key_edges_[j];
      key_columns_[j * pitch + W - 1] += key_edges_[d_.padded + j];
    }
    if (sums != nullptr)
      multiply<true>(p_.channels, pitch, d_.padded, Factor<C>{keys_.k.row(0), 1, d_.pitch}, key_columns_.get(), pitch,
                     sums, pitch);
    if (p_.grad_k.data != nullptr)
      multiply<true>(d_.padded, d_.width, W, Factor<C>{key_columns_.get(), pitch, 1}, d_.key_columns.of(keys_.head),
                     d_.width, own_.k, d_.pitch);
  }

  void write_queries() {
    const bool shared = p_.query_rel.data != nullptr && p_.rel_query.data == nullptr;
    for (int64_t r = 0; r < block_.rows(); ++r) {
      C* const row = grad_q_.get() + r * d_.pitch;
      multiply_by(row, d_.width, static_cast<C>(p_.scale));
      if (shared) add_to(row, rel_.get() + r * d_.query_columns.pitch(), d_.width);
      write_row(p_, p_.grad_q, block_.batch(), block_.query(r), block_.head(), p_.channels, row);
    }
  }

  // The depthwise term: its tables, and what it passes on to its values.
  void add_taps(int64_t r) {
    const int64_t h = block_.head();
    const Place& place = block_.place(r);
    C* const grad = grad_.get() + r * d_.pitch;
    if (value_conv_scale_ != nullptr) {
      keys_.convolve(place, row_.get());
      *value_conv_scale_ += dot(grad, row_.get(), d_.width);
    }
    multiply_by(grad, d_.width, d_.conv_scale(h));
    if (value_conv_bias_ != nullptr) add_to(value_conv_bias_, grad, d_.width);
    const Range taps = place.taps(p_);
    for (int64_t c = taps.first; c < taps.end; ++c) {
      const int64_t j = place.at - p_.left + c;
      d_.multiply_add(own_.v + j * d_.pitch, grad, d_.value_conv.of(h) + c * d_.width);
      if (value_conv_ != nullptr) d_.multiply_add(taps_.get() + c * d_.width, grad, keys_.v.row(j));
    }
  }

  const AttentionBackward& p_;
  const AttentionData<C>& d_;
  const bool scores_, folds_, folds_keys_;
  Keys<C> keys_;
  QueryBlock<C> block_;
  KeyGradients<C> own_{};
  Scratch<C> grad_, p_rows_, ds_rows_, keep_, grad_q_, columns_, p_columns_, rel_, row_, taps_, key_columns_,
      key_edges_;
  C shift_[kQueryRows], delta_[kQueryRows], excess_[kQueryRows];
  C *bias_ = nullptr, *query_rel_ = nullptr, *value_conv_ = nullptr, *value_conv_bias_ = nullptr,
    *value_conv_scale_ = nullptr;
};

// Rows begin .. end of d(k) and d(v) of one group: the sum of the parts' rows, in order. Keys that the mask hides have
// none.
template <class C>
inline void write_keys(const AttentionBackward& p, const AttentionData<C>& d, int64_t b, int64_t g, int64_t begin,
                       int64_t end, C* parts, int64_t count) {
  const int64_t size = d.padded * d.pitch;
  for (int64_t j = begin; j < end; ++j)
    for (int64_t t = 0; t < 2; ++t) {
      const HeadRows& to = t == 0 ? p.grad_k : p.grad_v;
      if (to.data == nullptr) continue;
      C* const row = parts + t * size + j * d.pitch;
      for (int64_t n = 1; n < count; ++n) add_to(row, row + 2 * n * size, d.width);
      if (t == 0) multiply_by(row, d.width, static_cast<C>(p.scale));
      if (d.count_real(b, j, j + 1) == 0) clear(row, d.width);
      write_row(p, to, b, j, g, p.channels, row);
    }
}

template <class C>
inline const char* attention_grad_typed(const AttentionBackward& p) {
  const AttentionData<C> data(p, true);
  // Each part takes memory for all keys; so they are few, however long the sequence.
  const Parts parts(p.batch * p.groups, p.sharing() * data.blocks(), least(32, 4 * p.batch * p.groups), 2);
  const GradientSums<C> sums(p, data, parts);
  const int64_t size = 2 * data.padded * data.pitch;  // of what a task leaves for the keys
  const bool whole = parts.parts <= 1;                // then the task writes them itself
  Scratch<C> left(whole ? 0 : parts.tasks() * size);
  parallel(p, parts.tasks(), data.threads, [&](int64_t begin, int64_t end) {
    GradientTask<C> task(p, data);
    Scratch<C> own(whole ? size : 0);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / parts.parts / p.groups, g = n / parts.parts % p.groups;
      C* const to = whole ? own.get() : left.get() + n * size;
      task.run(b, g, parts.of(n), sums, n, {to, to + size / 2});
      if (whole) write_keys(p, data, b, g, 0, p.keys, to, 1);
    }
  });
  if (!whole)
    parallel(p, parts.units * p.keys, data.threads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t unit = n / p.keys, j = n % p.keys;
        write_keys(p, data, unit / p.groups, unit % p.groups, j, j + 1, left.get() + unit * parts.parts * size,
                   parts.parts);
      }
    });
  sums.finish(p, data);
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
