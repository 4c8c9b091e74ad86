// What follows from the gradients of scores by columns: those of the tables bias and query_rel, and of the factor of
// query_rel. While keys go by, both these gradients and the weights are summed by the offsets of the keys.
//
// A row's gradients of scores sum to grad_lse. Theirs is off where delta carries the rounding of `out`, by the same
// share of each weight; a column that sums over many keys would add it up, so that it is taken out of the columns
// again.
#pragma once

#include "csrc/cpu/attention/sums.h"
#include "csrc/cpu/attention/tiles/backward_queries.h"

namespace ck::cpu::CK_ISA {

// Sums for the gradients of tables, those of one head after those of another.
struct TiledTableSums {
  using L = Layout<float>;

  const AttentionBackward& p;
  const TiledData& d;
  TableSums<float> bias, value_conv, value_conv_bias, value_conv_scale;
  int64_t tiles, query_rel, size = 0;  // tiles side by side; where that table's begin; floats of a head

  TiledTableSums(const AttentionBackward& problem, const TiledData& data)
      : p(problem),
        d(data),
        bias{p.bias, p.grad_bias, L::rows({1, 0}, {p.window(), 1}), 1},
        value_conv{p.value_conv, p.grad_value_conv, L::rows({p.window(), 1}, {p.channels, p.window()}), 1},
        value_conv_bias{p.value_conv_bias, p.grad_value_conv_bias, L::rows({1, 0}, {p.channels, 1}), 1},
        value_conv_scale{p.value_conv_scale, p.grad_value_conv_scale, L::rows({1, 0}, {1, 1}), 1},
        tiles(2 * ceil_div(p.window(), kBlock)) {
    for (TableSums<float>* table : {&bias, &value_conv, &value_conv_bias, &value_conv_scale}) {
      table->start = size;
      size += table->size();
    }
    query_rel = size;
    if (p.grad_query_rel != nullptr) size += d.rank.sixteens * tiles * kSums;
  }

  bool shared() const { return p.grad_query_rel != nullptr && !p.query_rel.per_head; }
  // d(query_rel) before its scale: tiles [rank / 16][tiles], rows turned; nullptr: not wanted.
  float* query_rel_of(float* head) const { return p.grad_query_rel != nullptr ? head + query_rel : nullptr; }

  // heads(h): the sums of a head. A table that all heads share takes those of all.
  template <class Heads>
  void write(Range range, const Heads& heads) const {
    for (int64_t h = range.first; value_conv_scale.out != nullptr && h < range.end; ++h) {
      float* const lanes = value_conv_scale.of(heads(h));
      Floats all[16] = {load_floats(lanes)};
      store_bytes(lanes, sum_each<float>(all));
    }
    for (const TableSums<float>* table : {&bias, &value_conv, &value_conv_bias, &value_conv_scale})
      table->write(range, heads);
    if (p.grad_query_rel == nullptr) return;
    if (shared()) {
      for (int64_t h = range.first + 1; h < range.end; ++h)
        add_to(query_rel_of(heads(range.first)), query_rel_of(heads(h)), size - query_rel);
      range = {0, 1};
    }
    Scratch<float> row(round_up(p.window(), kBlock));
    for (int64_t h = range.first; h < range.end; ++h)
      for (int64_t t = 0; t < d.rank.sixteens; ++t)
        for (int64_t n = 0; n < 16; ++n) {
          const int64_t channel = channel_of(t, n);
          if (channel >= p.rank) continue;
          const float* const from = query_rel_of(heads(h)) + t * tiles * kSums + n * 16;
          for (int64_t w = 0; w < tiles; ++w)
            store_bytes(row.get() + w * 16, load_floats(from + w * kSums) * static_cast<float>(p.rel_scale));
          convert_out(p.query_rel.dtype, row.get(), p.window(), p.grad_query_rel, (h * p.rank + channel) * p.window(),
                      1);
        }
  }
};

// Of 32 queries.
class TiledColumns {
 public:
  TiledColumns(const AttentionBackward& p, const TiledData& data)
      : p_(p),
        d_(data),
        exists_(p.has_query_columns() && (p.grad_bias != nullptr || p.grad_query_rel != nullptr ||
                                          p.grad_q.data != nullptr || p.grad_rel_query.data != nullptr)),
        scores_(exists_ ? kBlock * data.pitch : 0),
        weights_(exists_ ? kBlock * data.pitch : 0),
        parts_(exists_ && p.query_rel.data != nullptr ? ceil_div(p.window(), kBlock) * 8 * kFactors : 0),
        sums_(exists_ && p.query_rel.data != nullptr ? kBlock * data.rank.padded : 0) {}

  bool exist() const { return exists_; }

  void clear_sums() {
    if (!exists_) return;
    clear(scores_.get(), kBlock * d_.pitch);
    clear(weights_.get(), kBlock * d_.pitch);
  }

  // Adds gradients of scores and weights of row r at an offset.
  CK_INLINE void add(int64_t r, int64_t offset, Floats score, Floats weight) {
    float *const s = scores_.get() + r * d_.pitch + offset, *const w = weights_.get() + r * d_.pitch + offset;
    store_bytes(s, load_floats(s) + score);
    store_bytes(w, load_floats(w) + weight);
  }

  // After the last key. head: sums of the tables of this head.
  template <class Machine>
  void finish(Machine& m, const BackwardQueries& rows, const TiledTableSums& tables, float* head) {
    if (!exists_) return;
    for (int64_t half = 0; half < 2; ++half) fold(half * 16, rows);
    m.stay_awake();
    if (float* const bias = tables.bias.of(head))
      for (int64_t c = 0; c < d_.columns; c += 16) {
        Floats sum = {};
        for (int64_t r = 0; r < kBlock; ++r) sum += load_floats(scores_.get() + r * d_.pitch + 16 + c);
        store_bytes(bias + c, load_floats(bias + c) + sum);
      }
    if (p_.query_rel.data == nullptr) return;
    split();
    multiply_table(m, rows.queries.head);
    if (float* const query_rel = tables.query_rel_of(head)) multiply_rows(m, rows, query_rel, tables.tiles);
  }

  // The gradient of the factor of query_rel before its scale: tiles [2 halves of the rows][rank / 16].
  const float* sums() const { return sums_.get(); }

 private:
  // Corrects 16 rows, and adds what lies beyond the window to its outermost columns.
  void fold(int64_t first, const BackwardQueries& rows) {
    Floats total[16], left[16], right[16];
    for (int64_t r = 0; r < 16; ++r) {
      total[r] = Floats{};
      for (int64_t c = 0; c < d_.pitch; c += 16) total[r] += load_floats(scores_.get() + (first + r) * d_.pitch + c);
    }
    const Floats totals = sum_each<float>(total);
    for (int64_t r = 0; r < 16; ++r) {
      float *const s = scores_.get() + (first + r) * d_.pitch, *const w = weights_.get() + (first + r) * d_.pitch;
      const Floats excess = splat(rows.grad_lse[first + r] - totals[r]);
      for (int64_t c = 0; c < d_.pitch; c += 16)
        store_bytes(s + c, fused(excess, load_floats(w + c), load_floats(s + c)));
      left[r] = load_floats(s);
      right[r] = load_floats(s + 16 + p_.window());
    }
    const Floats lefts = sum_each<float>(left), rights = sum_each<float>(right);
    for (int64_t r = 0; r < 16; ++r) {
      float* const row = scores_.get() + (first + r) * d_.pitch + 16;
      if (p_.clips()) {
        row[0] += lefts[r];
        row[p_.window() - 1] += rights[r];
      }
      for (int64_t c = p_.window(); c < d_.pitch - 16; ++c) row[c] = 0;
    }
  }

  // The columns as operands of two parts each, for blocks of 32: left ones [upper, lower], [rest of these], then right
  // ones [first, second], [rest of these], whose products sum over the queries.
  void split() {
    for (int64_t w = 0; w * kBlock < p_.window(); ++w) {
      bf16* const to = parts_.get() + w * 8 * kFactors;
      for (int64_t r = 0; r < 16; ++r) {
        Words high[2][2], low[2][2];  // rows r and r + 16, columns and those 16 further
        for (int64_t a = 0; a < 2; ++a)
          for (int64_t c = 0; c < 2; ++c) {
            const int64_t column = w * kBlock + c * 16;
            Floats value = {};
            if (column < p_.window()) value = load_floats(scores_.get() + (r + 16 * a) * d_.pitch + 16 + column);
            high[a][c] = rounded(value);
            low[a][c] = rounded(value - high_halves(high[a][c]));
          }
        for (int64_t a = 0; a < 2; ++a) {
          store_bytes(to + a * kFactors + r * 32, join_halves(high[a][0], high[a][1]));
          store_bytes(to + (2 + a) * kFactors + r * 32, join_halves(low[a][0], low[a][1]));
          store_bytes(to + (4 + a) * kFactors + r * 32, join_halves(high[0][a], high[1][a]));
          store_bytes(to + (6 + a) * kFactors + r * 32, join_halves(low[0][a], low[1][a]));
        }
      }
    }
  }

  // Columns times query_rel, all but the product of both rests.
  template <class Machine>
  void multiply_table(Machine& m, int64_t h) {
    const int64_t blocks = ceil_div(p_.window(), kBlock);
    for (int64_t t = 0; t < d_.rank.sixteens; t += 2) {
      float *const upper = sums_.get() + t * kSums, *const lower = upper + d_.rank.sixteens * kSums;
      for (int64_t part = 0; part < d_.tables.parts(); ++part)
        for (int64_t rest = 0; rest < 2 - part; ++rest) {
          const bf16 *const a = parts_.get() + rest * 2 * kFactors, *const b =
                                                                        d_.tables.by_rows(h, 0, part) + t * kFactors;
          multiply_block(m, part == 0 && rest == 0, blocks, {a, a + kFactors, 64, 8 * kFactors},
                         {b, b + kFactors, d_.tables.step()}, {upper, upper + kSums, lower, lower + kSums});
        }
    }
  }

  // The factor of query_rel times columns, added to `sums`.
  template <class Machine>
  void multiply_rows(Machine& m, const BackwardQueries& rows, float* sums, int64_t tiles) {
    for (int64_t t = 0; t < d_.rank.sixteens; t += 2)
      for (int64_t w = 0; w * kBlock < p_.window(); ++w) {
        const bf16 *const a = rows.r_turned() + t * kFactors, *const b = parts_.get() + (w * 8 + 4) * kFactors;
        float *const upper = sums + (t * tiles + 2 * w) * kSums, *const lower = upper + tiles * kSums;
        multiply_block(m, false, 2, {a, a + kFactors, 64, 0}, {b, b + kFactors, 2 * kFactors},
                       {upper, upper + kSums, lower, lower + kSums});
      }
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t c = 0; rows.nonfinite_r >> r & 1 && c < p_.window(); ++c) {
        const float score = scores_[r * d_.pitch + 16 + c];
        if (score == 0.0f) continue;
        for (int64_t t = 0; t < d_.rank.sixteens; ++t)
          for (int64_t n = 0; n < 16; ++n)
            sums[(t * tiles + c / 16) * kSums + n * 16 + c % 16] +=
                score * to_float(rows.queries.r()[r * d_.rank.padded + channel_of(t, n)]);
      }
  }

  const AttentionBackward& p_;
  const TiledData& d_;
  const bool exists_;
  Scratch<float> scores_, weights_;  // [32][pitch], as the rows of offsets
  Scratch<bf16> parts_;
  Scratch<float> sums_;
};

}  // namespace ck::cpu::CK_ISA
