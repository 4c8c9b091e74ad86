// 32 queries of the backward pass on tiles: operands of q, of the incoming gradient, and the sums that end with them.
#pragma once

#include "csrc/cpu/attention/tiles/queries.h"

namespace ck::cpu::CK_ISA {

class BackwardQueries {
 public:
  // q_turned, grad_turned: where these operands go.
  BackwardQueries(const AttentionBackward& p, const TiledData& data, bf16* q_turned, bf16* grad_turned)
      : queries(data, true),
        p_(p),
        d_(data),
        q_turned_(q_turned),
        grad_turned_(grad_turned),
        grad_(data.width.factors()),
        r_turned_(p.rel_query.data != nullptr ? data.rank.factors() : 0),
        rows_(max(data.width.factors(), data.rank.factors())),
        by_rows_(max(data.width.factors(), data.rank.factors())),
        sums_(kBlock * data.width.padded) {}

  template <class Machine>
  void load(Machine& m, int64_t b, int64_t h, int64_t block) {
    const int64_t first = block * kBlock;
    uint32_t rows = 0;
    for (int64_t r = 0; r < kBlock; ++r) {
      shift[r] = delta[r] = grad_lse[r] = 0;
      if (first + r >= p_.queries) continue;
      const float lse = scalar<float>(p_.lse, b, h, first + r);
      // A row with lse = -inf sees no keys; where results of several calls are merged its grad_lse is NaN.
      if (lse == -__builtin_inff()) continue;
      rows |= 1u << r;
      shift[r] = lse * static_cast<float>(kLog2e);
      if (p_.grad_lse.data != nullptr) grad_lse[r] = with_plain_nan(scalar<float>(p_.grad_lse, b, h, first + r));
    }
    queries.load(m, b, h, block, rows);
    queries.fill(shift);
    read_rows(p_.grad, d_.width, b, h, first, rows, grad_.get());
    read_rows(p_.out, d_.width, b, h, first, rows, rows_.get());
    find_delta();
    m.stay_awake();
    nonfinite_grad = turn(grad_.get(), d_.width, grad_turned_);
    nonfinite_q = turn(queries.q(), d_.width, q_turned_);
    nonfinite_r = nonfinite_q;
    if (p_.rel_query.data != nullptr) nonfinite_r = turn(queries.r(), d_.rank, r_turned_.get());
    memset(sums_.get(), 0, static_cast<size_t>(kBlock * d_.width.padded) * sizeof(float));
  }

  const bf16* grad() const { return grad_.get(); }
  // The factor of query_rel, turned; rows that are not finite are zeros there, as in q_turned and grad_turned.
  const bf16* r_turned() const { return p_.rel_query.data != nullptr ? r_turned_.get() : q_turned_; }
  // d(q) before its scale: tiles [2 halves of the rows][channels / 16], as products with operands by rows leave them.
  float* sums() { return sums_.get(); }

  TiledQueries queries;
  alignas(64) float shift[kBlock], delta[kBlock];  // lse to base 2; what is subtracted from the gradients of weights
  float grad_lse[kBlock];
  uint32_t nonfinite_q = 0, nonfinite_r = 0, nonfinite_grad = 0;  // bits of rows

 private:
  // delta = grad * out - grad_lse; out is in rows_.
  void find_delta() {
    for (int64_t half = 0; half < 2; ++half) {
      Floats sum[16];
      for (int64_t r = 0; r < 16; ++r) {
        sum[r] = Floats{};
        for (int64_t c = 0; c < d_.width.padded; c += 32) {
          const int64_t at = (half * 16 + r) * d_.width.padded + c;
          const Words grad = load_words(grad_.get() + at), out = load_words(rows_.get() + at);
          sum[r] = fused(low_halves(grad), low_halves(out), sum[r]);
          sum[r] = fused(high_halves(grad), high_halves(out), sum[r]);
        }
      }
      const Floats total = sum_each<float>(sum);
      for (int64_t r = 0; r < 16; ++r) delta[half * 16 + r] = total[r] - grad_lse[half * 16 + r];
    }
  }

  // Returns the rows that are not finite.
  uint32_t turn(const bf16* rows, const Width& width, bf16* to) {
    const uint32_t nonfinite = nonfinite_rows(rows, width);
    if (nonfinite != 0) {
      memcpy(static_cast<void*>(rows_.get()), rows, static_cast<size_t>(width.factors()) * sizeof(bf16));
      clear_rows(nonfinite, width, rows_.get());
      rows = rows_.get();
    }
    pack_by_rows(rows, width.padded, width, by_rows_.get());
    pack_turned(by_rows_.get(), width, to);
    return nonfinite;
  }

  const AttentionBackward& p_;
  const TiledData& d_;
  bf16 *const q_turned_, *const grad_turned_;
  Scratch<bf16> grad_, r_turned_, rows_, by_rows_;
  Scratch<float> sums_;
};

}  // namespace ck::cpu::CK_ISA
