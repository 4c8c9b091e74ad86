// The forward pass on tiles. A block of 32 queries walks over the keys, a few blocks of them at a time: scores, weights
// in their place, and their product with the values, which stays in float32.
//
// Weights are 2^(score - shift), where the shift is an integer. Any integer gives the same results, unless weights
// leave the numbers that float32 has; so no maximum is looked for where |q| |k| and the tables bound the scores well
// enough. Elsewhere, and where values are tiny, the shift of a row is its greatest score, found by a walk of its own.
#pragma once

#include "csrc/cpu/attention/dropout.h"
#include "csrc/cpu/attention/tables.h"
#include "csrc/cpu/attention/tiles/depthwise.h"
#include "csrc/cpu/attention/tiles/key_terms.h"
#include "csrc/cpu/attention/tiles/values.h"

namespace ck::cpu::CK_ISA {

constexpr int64_t kChunk = 4;           // blocks of keys whose scores are held together
constexpr int64_t kScores = 4 * kSums;  // of 32 queries and 32 keys: [2 halves of the keys][32][16]
constexpr int64_t kAwakeRows = 150;     // rows of scores of a block between two products

template <class Machine>
class TiledForwardTask {
 public:
  TiledForwardTask(const AttentionForward& p, const TiledData& data)
      : p_(p),
        d_(data),
        queries_(data, false),
        values_(data),
        key_terms_(data),
        depthwise_(p, data),
        keys_(data.key_blocks * data.width.factors()),
        scores_(kChunk * kScores),
        out_(kBlock * data.width.padded),
        sums_(2 * kBlock * 16),
        keep_(p.dropout > 0.0 ? kChunk * kBlock : 0) {}

  // Blocks of queries in the order of batch rows and heads.
  void run(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pair = n / d_.query_blocks, b = pair / p_.heads, h = pair % p_.heads;
      load_group(b, h / p_.sharing());
      const int64_t block = n % d_.query_blocks;
      queries_.load(m_, b, h, block, below(p_.queries - block * kBlock));
      if (key_terms_.exists()) key_terms_.choose_head(m_, h);
      run_block();
    }
  }

 private:
  // kClean: every query sees every key. kCareful: with dropout, or less a shift of the row's own.
  enum Mode { kClean, kMasked, kCareful };

  void load_group(int64_t b, int64_t g) {
    if (!values_.load(m_, b, g)) return;
    if (key_terms_.exists()) key_terms_.load(b, g);
    Floats longest = {};
    for (int64_t n = 0; n < d_.key_blocks; ++n) {
      m_.stay_awake();
      Floats squares[2];
      bf16* const to = keys_.get() + n * d_.width.factors();
      values_.pack(p_.k, n,
                   [&](const bf16* rows, int64_t pitch) { pack_by_channels(rows, pitch, d_.width, to, squares); });
      // NaN stays, as infinity does.
      for (const Floats s : squares) longest = s <= longest ? longest : s;
    }
    longest = square_root(longest);
    longest_key_ = 0;
    for (int i = 0; i < 16; ++i) longest_key_ = longest[i] <= longest_key_ ? longest_key_ : longest[i];
  }

  void run_block() {
    const float middle = d_.bias_middle[queries_.head];
    far_ = !(farthest_score() + d_.bias_reach[queries_.head] <= kReach && __builtin_fabsf(middle) <= 100.0f) ||
           values_.tiny();
    shift_ = far_ ? 0.0f : __builtin_rintf(middle);
    queries_.fill(nullptr);
    walk(false);
    if (!is_finite()) {  // by numbers out of range, or by values that some rows do not see
      far_ = true;
      walk(true);
    }
    write();
  }

  // What all but bias may add to a score.
  float farthest_score() const {
    const auto longest = [](const bf16* rows, const Width& width) {
      const Floats upper = squares_of(rows, width), lower = squares_of(rows + 16 * width.padded, width);
      const Floats roots = square_root(lower <= upper ? upper : lower);
      float most = 0;
      for (int i = 0; i < 16; ++i) most = roots[i] <= most ? most : roots[i];
      return most;
    };
    const float q = longest(queries_.q(), d_.width);
    float sum = p_.qk ? q * longest_key_ * __builtin_fabsf(d_.scale) : 0.0f;
    if (p_.query_rel.data != nullptr) {
      const float r = p_.rel_query.data != nullptr ? longest(queries_.r(), d_.rank) : q;
      sum += r * d_.tables.length(queries_.head) * __builtin_fabsf(d_.rel_scale);
    }
    if (key_terms_.exists()) sum += longest_key_ * d_.key_tables.length(queries_.head) * __builtin_fabsf(d_.scale);
    return sum * 1.001f;
  }

  // Leaves the sums of weights, and of weights and values. selects: values that are not finite go to those alone who
  // see them.
  void walk(bool selects) {
    if (far_) find_shifts();
    clear(sums_.get(), 2 * kBlock * 16);
    if (queries_.first_block == queries_.end_block) clear(out_.get(), kBlock * d_.width.padded);
    for (int64_t first = queries_.first_block; first < queries_.end_block; first += kChunk) {
      const int64_t end = min(first + kChunk, queries_.end_block);
      multiply_keys(first, end);
      KeyRun runs[kChunk];
      const int64_t count = queries_.find_runs(first, end, runs);
      idle_ = 0;
      for (int64_t n = 0; n < count; ++n) weigh(runs[n], first);
      const auto* const weights = reinterpret_cast<const bf16*>(scores_.get());
      const bf16* const values = values_.chunk(first, end, selects);
      for (int64_t t = 0; t < d_.width.sixteens; t += 2) {
        float *const upper = out_.get() + t * kSums, *const lower = upper + d_.width.sixteens * kSums;
        const bf16* const v = values + t * kFactors;
        multiply_block(m_, first == queries_.first_block, end - first, {weights, weights + kFactors, 64, 2 * kScores},
                       {v, v + kFactors, d_.width.factors()}, {upper, upper + kSums, lower, lower + kSums});
      }
      if (selects) values_.add_nonfinite(first, end, queries_, weights, out_.get());
    }
  }

  void multiply_keys(int64_t first, int64_t end) {
    if (p_.qk)
      multiply_channels(m_, d_.width, queries_.q(), keys_.get() + first * d_.width.factors(), end - first,
                        scores_.get(), kScores);
    else
      clear(scores_.get(), (end - first) * kScores);
    for (int64_t k = first; k < end && key_terms_.exists(); ++k)
      key_terms_.add(m_, queries_, k, scores_.get() + (k - first) * kScores);
  }

  // The greatest score of each row; 0 for a row without keys.
  void find_shifts() {
    for (int64_t r = 0; r < kBlock; ++r) shifts_[r] = -__builtin_inff();
    for (int64_t k = queries_.first_block; k < queries_.end_block; ++k) {
      multiply_keys(k, k + 1);
      KeyRun run;
      queries_.find_runs(k, k + 1, &run);
      for (int64_t r = 0; r < queries_.count; ++r) {
        const auto offsets = queries_.offsets(r);
        for (int64_t half = 0; half < 2; ++half) {
          const Floats term =
              run.side == kWindow ? offsets.load(k * kBlock + half * 16) : splat(queries_.edge(r, run.side));
          const Floats s = fused(load_floats(scores_.get() + half * 2 * kSums + r * 16), splat(d_.scale), term);
          const uint32_t seen = queries_.visible(r, k) >> (16 * half);
          for (int i = 0; i < 16; ++i)
            if (seen >> i & 1 && s[i] > shifts_[r]) shifts_[r] = s[i];
        }
      }
    }
    for (float& shift : shifts_) shift = shift == -__builtin_inff() ? 0.0f : __builtin_ceilf(shift);
  }

  void weigh(const KeyRun& run, int64_t base) {
    const Mode mode = far_ || p_.dropout > 0.0 ? kCareful : run.clean ? kClean : kMasked;
    const auto side = [&](auto constant) {
      constexpr Side kSide = constant;
      if (mode == kClean) return weigh_run<kSide, kClean>(run, base);
      if (mode == kMasked) return weigh_run<kSide, kMasked>(run, base);
      return weigh_run<kSide, kCareful>(run, base);
    };
    if (run.side == kWindow) return side(std::integral_constant<Side, kWindow>());
    side(std::integral_constant<Side, kLeft>());  // both are constants
  }

  template <Side kSide, Mode kMode>
  __attribute__((noinline)) void weigh_run(const KeyRun& run, int64_t base) {
    const PowerSeries series(kMode == kCareful ? 1.0f : __builtin_ldexpf(1.0f, -static_cast<int>(shift_)));
    for (int64_t r = 0; r < kBlock; ++r) {
      weigh_row<kSide, kMode>(r, run, base, series);
      idle_ += (run.end - run.first) * (kSide == kWindow || kMode != kClean ? 2 : 1);
      if (idle_ < kAwakeRows) continue;
      m_.stay_awake();
      idle_ = 0;
    }
  }

  // Weights, in place of scores: row r of a block holds 32 numbers in the order of pairs x, x + 16.
  template <Side kSide, Mode kMode>
  CK_INLINE void weigh_row(int64_t r, const KeyRun& run, int64_t base, const PowerSeries& series) {
    float* const sums = sums_.get() + r * 32;
    Floats sum[2] = {load_floats(sums), Floats{}}, rounded_sum[2] = {load_floats(sums + 16), Floats{}};
    const Floats scale = splat(d_.scale), constant = splat(queries_.edge(r, run.side));
    const auto offsets = queries_.offsets(r);
    const float shift = far_ ? shifts_[r] : shift_;
    float* at = scores_.get() + (run.first - base) * kScores + r * 16;
    const bool drops = kMode == kCareful && p_.dropout > 0.0;
    if (drops)
      draw(p_, queries_.batch, queries_.head, queries_.first + r, run.first * kBlock, (run.end - run.first) * kBlock,
           keep_.get());
    for (int64_t k = run.first, end = run.end; k < end; ++k, at += kScores) {
      const uint32_t seen = kMode == kClean ? ~0u : queries_.visible(r, k);
      Words weight[2];
      CK_UNROLL for (int64_t half = 0; half < 2; ++half) {
        const Floats s = fused(load_floats(at + half * 2 * kSums), scale,
                               kSide == kWindow ? offsets.load(k * kBlock + half * 16) : constant);
        Floats p;
        if constexpr (kMode == kCareful) {
          const Floats fraction = fraction_of(s);
          p = scale_by_power(series(fraction), (s - fraction) - shift);
        } else {
          p = series.power(s);
        }
        if (kMode != kClean) p = keep_lanes(seen >> (16 * half), p);
        sum[half] += p;
        weight[half] = rounded(p);
        // A row that sees one key returns its value.
        rounded_sum[half] += high_halves(weight[half]);
        if (drops) {
          const Floats keep = load_floats(keep_.get() + (k - run.first) * kBlock + 16 * half);
          weight[half] = keep == Floats{} ? Words{} : weight[half];
        }
      }
      store_bytes(at, join_halves(weight[0], weight[1]));
    }
    store_bytes(sums, sum[0] + sum[1]);
    store_bytes(sums + 16, rounded_sum[0] + rounded_sum[1]);
  }

  bool is_finite() const {
    Floats zero[4] = {};
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t t = 0; t < d_.width.sixteens; ++t)
        for (int64_t r = 0; r < min(16, queries_.count - half * 16); ++r)
          zero[r % 4] = fused(load_floats(row(half, r) + t * kSums), Floats{}, zero[r % 4]);
    const Floats sum = (zero[0] + zero[1]) + (zero[2] + zero[3]);
    return greatest(sum == Floats{} ? Floats{} : splat(1.0f)) == 0.0f;
  }

  // Of the sums of weights and values: the first of its tiles.
  const float* row(int64_t half, int64_t r) const { return out_.get() + half * d_.width.sixteens * kSums + r * 16; }

  void write() {
    const float scale =
        p_.dropout > 0.0 ? (p_.dropout < 1.0 ? static_cast<float>(1.0 / (1.0 - p_.dropout)) : 0.0f) : 1.0f;
    for (int64_t half = 0; half * 16 < queries_.count; ++half) {
      Floats sum[16], rounded_sum[16], shift = splat(shift_);
      for (int64_t r = 0; r < 16; ++r) {
        const float* const sums = sums_.get() + (half * 16 + r) * 32;
        sum[r] = load_floats(sums);
        rounded_sum[r] = load_floats(sums + 16);
        if (far_) shift[r] = shifts_[half * 16 + r];
      }
      const Floats total = sum_each<float>(sum);
      const auto sees = total != Floats{};
      // NaN wherever the sum is no number, also if its weights were rounded to some.
      const Floats factor = splat(scale) / sum_each<float>(rounded_sum) + total * 0.0f;
      const Floats lse = log2_plus(total, shift) * static_cast<float>(kLn2);
      alignas(64) float factors[16], lses[16];
      store_bytes(factors, sees ? factor : Floats{});
      store_bytes(lses, sees ? lse : splat(-__builtin_inff()));
      for (int64_t r = 0; r < min(16, queries_.count - half * 16); ++r) {
        const int64_t i = queries_.first + half * 16 + r;
        scalar<float>(p_.lse, queries_.batch, queries_.head, i) = lses[r];
        if (depthwise_.exists())
          write_convolved(half, r, i, factors[r]);
        else
          write_row(half, r, i, factors[r]);
      }
    }
  }

  // A row without keys has no weights: the sums are zeros.
  void write_row(int64_t half, int64_t r, int64_t i, float factor) {
    const RowOf to(p_.out, queries_.batch, i, queries_.head);
    const float* const from = row(half, r);
    for (int64_t t = 0; t < d_.width.sixteens; t += 2)
      to.store(
          t * 16, d_.width.channels - t * 16,
          restore_order(to_bf16(load_floats(from + t * kSums) * factor, load_floats(from + (t + 1) * kSums) * factor)));
  }

  void write_convolved(int64_t half, int64_t r, int64_t i, float factor) {
    const RowOf to(p_.out, queries_.batch, i, queries_.head);
    const float* const from = row(half, r);
    depthwise_.convolve(queries_.batch, queries_.head, queries_.position(half * 16 + r));
    for (int64_t t = 0; t < d_.width.sixteens; t += 2) {
      Floats first, second;
      restore_order(load_floats(from + t * kSums) * factor, load_floats(from + (t + 1) * kSums) * factor, first,
                    second);
      depthwise_.add(t * 16, first, second);
      to.store(t * 16, d_.width.channels - t * 16, to_bf16(first, second));
    }
  }

  const FlushDenormals flush_;
  Machine m_;
  const AttentionForward& p_;
  const TiledData& d_;
  TiledQueries queries_;
  TiledValues values_;
  KeyTerms key_terms_;
  Depthwise depthwise_;
  Scratch<bf16> keys_;
  Scratch<float> scores_, out_, sums_, keep_;  // out_: tiles [2 halves of the rows][channels / 16]; sums_: [32][2][16]
  float longest_key_ = 0;
  bool far_ = false;
  float shift_ = 0, shifts_[kBlock];  // of all rows; of each, if far_
  int64_t idle_ = 0;                  // rows of scores since the last product
};

template <class Machine>
inline const char* tiled_attention_forward(const AttentionForward& p) {
  const TiledData data(p, false);
  parallel(p, p.batch * p.heads * data.query_blocks, data.threads, [&](int64_t begin, int64_t end) {
    TiledForwardTask<Machine> task(p, data);
    task.run(begin, end);
  });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
