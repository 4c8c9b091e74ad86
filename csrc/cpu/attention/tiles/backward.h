// The backward pass on tiles. A task takes blocks of queries of one group of heads, four at a time: they walk over the
// keys, four blocks of these at a time, and weights and gradients of scores of up to sixteen pairs of blocks are held
// together. Sums of d(k) and d(v) are float32, turned: tiles [blocks of keys][2 halves][channels / 16].
#pragma once

#include "csrc/cpu/attention/dropout.h"
#include "csrc/cpu/attention/tiles/columns.h"
#include "csrc/cpu/attention/tiles/depthwise.h"
#include "csrc/cpu/attention/tiles/key_columns.h"

namespace ck::cpu::CK_ISA {

constexpr int64_t kQueryBlocks = 4, kKeyBlocks = 4;  // held together
constexpr int64_t kPair = 8 * kSums;                 // scores and gradients of weights, each [2 halves of keys][32][16]

template <class Machine>
class TiledBackwardTask {
 public:
  TiledBackwardTask(const AttentionBackward& p, const TiledData& data, const TiledTableSums& tables)
      : p_(p),
        d_(data),
        tables_(tables),
        depthwise_(p, data),
        key_terms_(data),
        key_columns_(p, data, kKeyBlocks),
        by_channels_(data.key_blocks * data.width.factors()),
        by_rows_(data.key_blocks * data.width.factors()),
        values_(data.key_blocks * data.width.factors()),
        rows_(data.width.factors()),
        held_(kKeyBlocks * kQueryBlocks * kPair),
        keep_(p.dropout > 0.0 ? 2 * kKeyBlocks * kBlock : 0),
        nonfinite_keys_(data.key_blocks),
        q_turned_(kQueryBlocks * data.width.factors()),
        grad_turned_(kQueryBlocks * data.width.factors()),
        queries_{queries(0), queries(1), queries(2), queries(3)},
        columns_{TiledColumns(p, data), TiledColumns(p, data), TiledColumns(p, data), TiledColumns(p, data)} {}

  // Floats of the sums of one group: d(k), d(v), and what the depthwise term adds to the latter, in natural rows.
  static int64_t key_sums(const TiledData& d) {
    return (d.p.value_conv.data != nullptr ? 3 : 2) * d.key_blocks * d.width.factors();
  }
  static int64_t steps(const TiledData& d) { return ceil_div(d.query_blocks, kQueryBlocks); }

  // Steps `range` of the heads of one group, which follow each other. keys: key_sums.
  void run(int64_t b, int64_t g, Range range, float* table_sums, float* keys) {
    grad_k_ = keys;
    grad_v_ = keys + d_.key_blocks * d_.width.factors();
    values_sums_ = grad_v_ + d_.key_blocks * d_.width.factors();
    load_keys(b, g);
    for (int64_t n = range.first; n < range.end; ++n) {
      const int64_t in_group = n / steps(d_), first = n % steps(d_) * kQueryBlocks, h = g * p_.sharing() + in_group;
      float* const head = table_sums + in_group * tables_.size;
      if (key_terms_.exists()) key_terms_.choose_head(m_, h);
      if (key_columns_.exist() && (n == range.first || first == 0)) key_columns_.clear_sums();
      run_queries(b, h, first, min(kQueryBlocks, d_.query_blocks - first), head);
      if (key_columns_.exist() && (n + 1 == range.end || (n + 1) % steps(d_) == 0))
        key_columns_.finish(m_, h, key_terms_, by_rows_.get(), nonfinite_keys_.get(), tables_.key_rel.of(head),
                            grad_k_);
    }
  }

 private:
  BackwardQueries queries(int64_t i) const {
    const int64_t at = i * d_.width.factors();
    return BackwardQueries(p_, d_, q_turned_.get() + at, grad_turned_.get() + at);
  }

  void load_keys(int64_t b, int64_t g) {
    if (key_terms_.exists()) key_terms_.load(b, g);
    for (int64_t n = 0; n < d_.key_blocks; ++n) {
      m_.stay_awake();
      const int64_t at = n * d_.width.factors();
      read_rows(p_.v, d_.width, b, g, n * kBlock, d_.keys_there(b, n), rows_.get());
      pack_by_channels(rows_.get(), d_.width.padded, d_.width, values_.get() + at);
      read_rows(p_.k, d_.width, b, g, n * kBlock, d_.keys_there(b, n), rows_.get());
      pack_by_channels(rows_.get(), d_.width.padded, d_.width, by_channels_.get() + at);
      // What is not finite reaches those queries alone that see it.
      nonfinite_keys_[n] = nonfinite_rows(rows_.get(), d_.width);
      clear_rows(nonfinite_keys_[n], d_.width, rows_.get());
      pack_by_rows(rows_.get(), d_.width.padded, d_.width, by_rows_.get() + at);
    }
  }

  void run_queries(int64_t b, int64_t h, int64_t block, int64_t count, float* table_sums) {
    Range keys{d_.key_blocks, 0};
    for (int64_t i = 0; i < count; ++i) {
      queries_[i].load(m_, b, h, block + i);
      columns_[i].clear_sums();
      const TiledQueries& q = queries_[i].queries;
      if (q.first_block < q.end_block) keys = {min(keys.first, q.first_block), max(keys.end, q.end_block)};
    }
    for (int64_t i = 0; i < count; ++i) {
      if (depthwise_.exists() || key_terms_.exists()) find_delta(i);
      if (depthwise_.exists()) add_taps(queries_[i].queries, table_sums);
    }
    for (int64_t first = keys.first; first < keys.end; first += kKeyBlocks) {
      const int64_t end = min(first + kKeyBlocks, keys.end);
      for (int64_t i = 0; i < count; ++i) {
        each_run(i, first, end, [&](const KeyRun& run) { differentiate(i, run, first); });
        for (int64_t k = first; k < end && key_columns_.exist(); ++k)
          key_columns_.add(queries_[i].queries, k, key_columns_.held(k - first));
      }
      add_keys(first, end, count);
      if (p_.qk && p_.grad_q.data != nullptr)
        for (int64_t i = 0; i < count; ++i) add_queries(i, first, end);
    }
    for (int64_t i = 0; i < count; ++i) {
      columns_[i].finish(m_, queries_[i], tables_, table_sums);
      write_queries(i);
    }
  }

  // A weight is 1 at most, also where scores are so large that lse is rounded by more than exponents reach.
  static CK_INLINE Floats weight_of(Floats score, const PowerSeries& series) {
    const Floats most = splat(1.0f);  // to base 2: more than rounding leaves of 0 elsewhere
    return series.power(most < score ? most : score);
  }

  float* pair(int64_t key, int64_t query) const { return held_.get() + (key * kQueryBlocks + query) * kPair; }

  // Scores and gradients of weights.
  void multiply_keys(int64_t i, int64_t first, int64_t end) {
    const int64_t at = first * d_.width.factors();
    if (p_.qk) {
      multiply_channels(m_, d_.width, queries_[i].queries.q(), by_channels_.get() + at, end - first, pair(0, i),
                        kQueryBlocks * kPair);
    } else {
      for (int64_t k = 0; k < end - first; ++k) clear(pair(k, i), 4 * kSums);
    }
    for (int64_t k = first; k < end && key_terms_.exists(); ++k)
      key_terms_.add(m_, queries_[i].queries, k, pair(k - first, i));
    multiply_channels(m_, d_.width, queries_[i].grad(), values_.get() + at, end - first, pair(0, i) + 4 * kSums,
                      kQueryBlocks * kPair);
  }

  template <class Body>
  void each_run(int64_t i, int64_t first, int64_t end, const Body& body) {
    multiply_keys(i, first, end);
    KeyRun runs[kKeyBlocks];
    const int64_t n = queries_[i].queries.find_runs(first, end, runs);
    for (int64_t x = 0; x < n; ++x) body(runs[x]);
  }

  // Multipliers of dropout of a row for a run of keys, to one of two places.
  void draw_keep(const TiledQueries& q, int64_t r, const KeyRun& run, int64_t place) {
    draw(p_, q.batch, q.head, q.first + r, run.first * kBlock, (run.end - run.first) * kBlock, keep(place, 0));
  }
  float* keep(int64_t place, int64_t key) const { return keep_.get() + place * kKeyBlocks * kBlock + key; }

  // The sum of weights times their gradients, where that of grad * out will not do: where `out` holds the depthwise
  // term as well, whose rounding would reach all gradients of a row; and for the columns of keys, which sum over many
  // rows.
  void find_delta(int64_t i) {
    const TiledQueries& q = queries_[i].queries;
    const PowerSeries series(1.0f);
    Floats products[kBlock] = {}, weights[kBlock] = {};
    for (int64_t first = q.first_block; first < q.end_block; first += kKeyBlocks)
      each_run(i, first, min(first + kKeyBlocks, q.end_block), [&](const KeyRun& run) {
        for (int64_t r = 0; r < kBlock; ++r) {
          const auto offsets = q.offsets(r);
          if (p_.dropout > 0.0) draw_keep(q, r, run, 0);
          for (int64_t k = run.first; k < run.end; ++k)
            for (int64_t half = 0; half < 2; ++half) {
              const float* const at = pair(k - first, i) + half * 2 * kSums + r * 16;
              const Floats term =
                  run.side == kWindow ? offsets.load(k * kBlock + half * 16) : splat(q.edge(r, run.side));
              const Floats p = weight_of(fused(load_floats(at), splat(d_.scale), term), series);
              Floats dp = load_floats(at + 4 * kSums);
              if (p_.dropout > 0.0) dp *= load_floats(keep(0, (k - run.first) * kBlock + half * 16));
              const uint32_t seen = q.visible(r, k) >> (16 * half);
              weights[r] += keep_lanes(seen, p);
              products[r] += keep_lanes(seen, p * dp);
            }
        }
      });
    for (int64_t half = 0; half < 2; ++half) {
      const Floats weight = sum_each<float>(weights + half * 16), product = sum_each<float>(products + half * 16);
      const Floats delta = weight == Floats{} ? Floats{} : product / weight;
      store_bytes(queries_[i].delta + half * 16, delta - load_floats(queries_[i].grad_lse + half * 16));
    }
  }

  void add_taps(const TiledQueries& q, float* head) {
    const Depthwise::Sums sums{tables_.value_conv.of(head), tables_.value_conv_bias.of(head),
                               tables_.value_conv_scale.of(head), p_.grad_v.data != nullptr ? values_sums_ : nullptr};
    for (int64_t r = 0; r < q.count; ++r)
      depthwise_.differentiate(q.batch, q.head, q.position(r), RowOf(p_.grad, q.batch, q.first + r, q.head), sums);
  }

  void differentiate(int64_t i, const KeyRun& run, int64_t base) {
    const bool clean = run.clean && p_.dropout == 0.0;
    if (run.side == kWindow) return clean ? weigh_run<true, true>(i, run, base) : weigh_run<true, false>(i, run, base);
    clean ? weigh_run<false, true>(i, run, base) : weigh_run<false, false>(i, run, base);
  }

  template <bool kNear, bool kClean>
  __attribute__((noinline)) void weigh_run(int64_t i, const KeyRun& run, int64_t base) {
    const PowerSeries series(1.0f);
    for (int64_t r = 0; r < 16; ++r) {
      if (r % 4 == 0) m_.stay_awake();
      weigh_rows<kNear, kClean>(i, r, run, base, series);
    }
  }

  // Rows r and r + 16 together: weights, in place of scores in rows r; gradients of scores, in rows r + 16 and, as left
  // operand, in place of the first half of the gradients of weights.
  template <bool kNear, bool kClean>
  CK_INLINE void weigh_rows(int64_t i, int64_t r, const KeyRun& run, int64_t base, const PowerSeries& series) {
    const TiledQueries& q = queries_[i].queries;
    const Floats scale = splat(d_.scale);
    const bool drops = !kClean && p_.dropout > 0.0;
    Floats constant[2], delta[2], far_score[2] = {}, far_weight[2] = {};
    const TiledQueries::RowOffsets offsets[2] = {q.offsets(r), q.offsets(r + 16)};
    TiledColumns& columns = columns_[i];
    const bool sums_columns = columns.exist(), holds = key_columns_.exist();
    for (int64_t a = 0; a < 2; ++a) {
      constant[a] = splat(q.edge(r + 16 * a, run.side));
      delta[a] = splat(queries_[i].delta[r + 16 * a]);
      if (drops) draw_keep(q, r + 16 * a, run, a);
    }
    float* at = pair(run.first - base, i) + r * 16;
    for (int64_t k = run.first, end = run.end; k < end; ++k, at += kQueryBlocks * kPair) {
      float* const gradient = at + 4 * kSums;
      uint32_t seen[2] = {~0u, ~0u};
      if (!kClean)
        for (int64_t a = 0; a < 2; ++a) seen[a] = q.visible(r + 16 * a, k);
      Words score_bits[2][2];
      CK_UNROLL for (int64_t half = 0; half < 2; ++half) {
        Words weight_bits[2];
        CK_UNROLL for (int64_t a = 0; a < 2; ++a) {
          const int64_t place = half * 2 * kSums + a * kSums;
          int64_t offset = 0;
          Floats term = constant[a];
          if (kNear) {
            offset = offsets[a].offset_of(k * kBlock + half * 16);
            term = load_floats(offsets[a].first + offset);
          }
          const Floats s = fused(load_floats(at + place), scale, term);
          Floats p = weight_of(s, series), dp = load_floats(gradient + place), used;
          if (!kClean) p = keep_lanes(seen[a] >> (16 * half), p);
          used = p;
          if (drops) {
            const Floats multiplier = load_floats(keep(a, (k - run.first) * kBlock + half * 16));
            used = multiplier == Floats{} ? Floats{} : p;
            dp *= multiplier;
          }
          Floats score = p * (dp - delta[a]);
          if (!kClean) score = keep_lanes(seen[a] >> (16 * half), score);
          if (kNear) {
            if (sums_columns) columns.add(r + 16 * a, offset, score, p);
          } else {
            far_score[a] += score;
            far_weight[a] += p;
          }
          if (holds) store_bytes(key_columns_.held(k - base) + place + r * 16, score);
          weight_bits[a] = rounded(used);
          score_bits[a][half] = rounded(score);
        }
        store_bytes(at + half * 2 * kSums, join_halves(weight_bits[0], weight_bits[1]));
        store_bytes(at + half * 2 * kSums + kSums, join_halves(score_bits[0][half], score_bits[1][half]));
      }
      for (int64_t a = 0; a < 2; ++a)
        store_bytes(gradient + a * kSums, join_halves(score_bits[a][0], score_bits[a][1]));
    }
    if (kNear || !sums_columns) return;
    for (int64_t a = 0; a < 2; ++a)
      columns.add(r + 16 * a, run.side == kLeft ? 0 : p_.window() + 16, far_score[a], far_weight[a]);
  }

  // Adds to d(v) and d(k), turned.
  void add_keys(int64_t first, int64_t end, int64_t count) {
    for (int64_t k = first; k < end; ++k) {
      if (p_.grad_v.data != nullptr) add_turned(false, k, k - first, count, grad_v_);
      if (p_.qk && p_.grad_k.data != nullptr) add_turned(true, k, k - first, count, grad_k_);
    }
  }

  // scores: gradients of scores times q, otherwise weights times grad.
  void add_turned(bool scores, int64_t k, int64_t held, int64_t count, float* sums) {
    const int64_t sixteens = d_.width.sixteens, factors = d_.width.factors();
    const bf16* const a = (scores ? q_turned_ : grad_turned_).get();
    const auto* const b = reinterpret_cast<const bf16*>(pair(held, 0)) + (scores ? kFactors : 0);
    float* const to = sums + k * factors;
    for (int64_t t = 0; t < sixteens; t += 2) {
      float *const upper = to + t * kSums, *const second = upper + sixteens * kSums;
      multiply_block(m_, false, count, {a + t * kFactors, a + (t + 1) * kFactors, 64, factors},
                     {b, b + 2 * kFactors, 2 * kPair}, {upper, second, upper + kSums, second + kSums});
    }
    for (int64_t i = 0; i < count; ++i)
      if (const uint32_t rows = scores ? queries_[i].nonfinite_q : queries_[i].nonfinite_grad)
        add_nonfinite(rows, queries_[i].queries, scores ? queries_[i].queries.q() : queries_[i].grad(), k,
                      b + i * 2 * kPair, to);
  }

  // Adds what those rows of 32, left out of products, give the keys of block k that they see. weights: right operand.
  void add_nonfinite(uint32_t which, const TiledQueries& q, const bf16* rows, int64_t k, const bf16* weights,
                     float* to) const {
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t j = 0; which >> r & 1 && j < kBlock; ++j) {
        if (!q.sees(r, k * kBlock + j)) continue;
        const float weight = to_float(weights[j / 16 * 2 * kFactors + r % 16 * 32 + 2 * (j % 16) + r / 16]);
        for (int64_t t = 0; t < d_.width.sixteens; ++t)
          for (int64_t n = 0; n < 16; ++n)
            to[(j / 16 * d_.width.sixteens + t) * kSums + n * 16 + j % 16] +=
                weight * to_float(rows[r * d_.width.padded + channel_of(t, n)]);
      }
  }

  // Adds to d(q).
  void add_queries(int64_t i, int64_t first, int64_t end) {
    const int64_t sixteens = d_.width.sixteens, factors = d_.width.factors();
    const auto* const a = reinterpret_cast<const bf16*>(pair(0, i) + 4 * kSums);
    for (int64_t t = 0; t < sixteens; t += 2) {
      const bf16* const b = by_rows_.get() + first * factors + t * kFactors;
      float *const upper = queries_[i].sums() + t * kSums, *const lower = upper + sixteens * kSums;
      multiply_block(m_, false, end - first, {a, a + kFactors, 64, 2 * kQueryBlocks * kPair},
                     {b, b + kFactors, factors}, {upper, upper + kSums, lower, lower + kSums});
    }
    const TiledQueries& q = queries_[i].queries;
    for (int64_t k = first; k < end; ++k)
      for (int64_t j = 0; j < kBlock && nonfinite_keys_[k] >> j != 0; ++j)
        for (int64_t r = 0; nonfinite_keys_[k] >> j & 1 && r < q.count; ++r) {
          if (!q.sees(r, k * kBlock + j)) continue;
          const float score = to_float(a[(k - first) * 2 * kQueryBlocks * kPair + r * 32 + 2 * (j % 16) + j / 16]);
          float* const to = queries_[i].sums() + r / 16 * sixteens * kSums + r % 16 * 16;
          const RowOf key(p_.k, q.batch, k * kBlock + j, q.head / p_.sharing());
          for (int64_t t = 0; t < sixteens; ++t)
            for (int64_t n = 0; n < 16; ++n) {
              const int64_t c = channel_of(t, n);
              if (c < p_.channels) to[t * kSums + n] += score * to_float(key.data[c * key.channel]);
            }
        }
  }

  void write_queries(int64_t i) {
    const TiledQueries& q = queries_[i].queries;
    const bool shared = p_.query_rel.data != nullptr && p_.rel_query.data == nullptr;
    for (int64_t r = 0; r < q.count; ++r) {
      if (p_.grad_q.data != nullptr)
        write(p_.grad_q, d_.width, q.batch, q.head, q.first + r, row(queries_[i].sums(), d_.width, r), p_.scale,
              shared ? row(columns_[i].sums(), d_.width, r) : nullptr);
      if (p_.grad_rel_query.data != nullptr)
        write(p_.grad_rel_query, d_.rank, q.batch, q.head, q.first + r, row(columns_[i].sums(), d_.rank, r),
              p_.rel_scale, nullptr);
    }
  }
  static const float* row(const float* sums, const Width& width, int64_t r) {
    return sums + r / 16 * width.sixteens * kSums + r % 16 * 16;
  }

  // A row of tiles times `scale`, plus another times rel_scale if given.
  void write(const HeadRows& to, const Width& width, int64_t b, int64_t h, int64_t i, const float* from, double scale,
             const float* rel) const {
    const RowOf out(to, b, i, h);
    for (int64_t t = 0; t < width.sixteens; t += 2) {
      Floats part[2];
      for (int64_t n = 0; n < 2; ++n) {
        part[n] = load_floats(from + (t + n) * kSums) * static_cast<float>(scale);
        if (rel != nullptr) part[n] += load_floats(rel + (t + n) * kSums) * static_cast<float>(p_.rel_scale);
      }
      out.store(t * 16, width.channels - t * 16, restore_order(to_bf16(part[0], part[1])));
    }
  }

  const FlushDenormals flush_;
  Machine m_;
  const AttentionBackward& p_;
  const TiledData& d_;
  const TiledTableSums& tables_;
  Depthwise depthwise_;
  KeyTerms key_terms_;
  KeyColumns key_columns_;
  Scratch<bf16> by_channels_, by_rows_, values_, rows_;  // keys twice, values; a block of rows
  Scratch<float> held_, keep_;                           // [blocks of keys][blocks of queries] pairs
  Scratch<uint32_t> nonfinite_keys_;
  Scratch<bf16> q_turned_, grad_turned_;  // of all blocks of queries, one after the other
  BackwardQueries queries_[kQueryBlocks];
  TiledColumns columns_[kQueryBlocks];
  float *grad_k_ = nullptr, *grad_v_ = nullptr, *values_sums_ = nullptr;
};

}  // namespace ck::cpu::CK_ISA
