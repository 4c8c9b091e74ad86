// What follows from the gradients of scores by columns: those of the tables bias and query_rel, and of the factor of
// query_rel. While keys go by, both these gradients and the weights are summed by the offsets of the keys.
//
// A row's gradients of scores sum to grad_lse. Theirs is off where delta carries the rounding of `out`, by the same
// share of each weight; a column that sums over many keys would add it up, so that it is taken out of the columns
// again.
#pragma once

#include "csrc/cpu/attention/tiles/backward_queries.h"
#include "csrc/cpu/attention/tiles/column_products.h"
#include "csrc/cpu/attention/tiles/table_sums.h"

namespace ck::cpu::CK_ISA {

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
        products_(p.window(), data.rank, exists_ && p.query_rel.data != nullptr) {}

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
    products_.split(scores_.get() + 16, d_.pitch);
    products_.multiply_table(m, d_.tables, rows.queries.head);
    if (float* const query_rel = tables.query_rel.of(head)) {
      products_.multiply_rows(m, rows.r_turned(), query_rel);
      products_.add_nonfinite(rows.nonfinite_r, rows.queries.r(), scores_.get() + 16, d_.pitch, query_rel);
    }
  }

  // The gradient of the factor of query_rel before its scale: tiles [2 halves of the rows][rank / 16].
  const float* sums() const { return products_.sums(); }

 private:
  // Corrects 16 rows, and adds what lies beyond the window to its outermost columns.
  void fold(int64_t first, const BackwardQueries& rows) {
    Floats total[16];
    for (int64_t r = 0; r < 16; ++r) {
      total[r] = Floats{};
      for (int64_t c = 0; c < d_.pitch; c += 16) total[r] += load_floats(scores_.get() + (first + r) * d_.pitch + c);
    }
    const Floats totals = sum_each<float>(total);
    for (int64_t r = 0; r < 16; ++r) {
      float *const s = scores_.get() + (first + r) * d_.pitch, *const w = weights_.get() + (first + r) * d_.pitch;
      const float excess = rows.grad_lse[first + r] - totals[r];
      if (excess - excess != 0.0f) continue;  // NaN or infinity, which is to stay with the columns that the row sees
      for (int64_t c = 0; c < d_.pitch; c += 16)
        store_bytes(s + c, fused(splat(excess), load_floats(w + c), load_floats(s + c)));
    }
    fold_edges(p_, scores_.get() + first * d_.pitch, d_.pitch);
  }

  const AttentionBackward& p_;
  const TiledData& d_;
  const bool exists_;
  Scratch<float> scores_, weights_;  // [32][pitch], as the rows of offsets
  ColumnProducts products_;
};

}  // namespace ck::cpu::CK_ISA
