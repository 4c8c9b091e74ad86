// attention: the forward pass. Each block of queries walks over the keys once, keeping the largest score, the sum of
// the exponentials and the unnormalised result of each row.
#pragma once

#include "csrc/cpu/attention/block.h"

namespace ck::cpu::CK_ISA {

template <class C>
class AttentionForwardTask {
 public:
  AttentionForwardTask(const AttentionForward& p, const AttentionData<C>& data)
      : p_(p),
        d_(data),
        keys_(data, false),
        block_(data, keys_),
        s_(kQueryRows * kScorePitch<C>),
        keep_(p.dropout > 0.0 ? kKeyColumns : 0),
        out_(kQueryRows * data.pitch),
        clean_(kKeyColumns * data.pitch),
        taps_(p.value_conv.data != nullptr ? data.width : 0) {}

  // Blocks `range` of the heads of one group, which follow each other.
  void run(int64_t b, int64_t g, Range range) {
    keys_.load(b, g);
    knows_nonfinite_ = false;
    for (int64_t n = range.first; n < range.end; ++n) {
      keys_.choose_head(g * p_.sharing() + n / d_.blocks());
      run_block(n % d_.blocks());
    }
  }

 private:
  void run_block(int64_t block) {
    block_.load(block);
    walk(false);
    const int64_t rows = block_.rows();
    bool finite = true;
    for (int64_t r = 0; r < rows; ++r) finite = finite && is_finite(out_.get() + r * d_.pitch, d_.width);
    if (!finite) {  // perhaps by a value that some rows do not see
      if (!knows_nonfinite_) keys_.v.find_nonfinite();
      knows_nonfinite_ = true;
      walk(true);
    }
    for (int64_t r = 0; r < rows; ++r) write(r);
  }

  // Leaves the unnormalised results. selects: values that are not finite go to those alone who see them.
  void walk(bool selects) {
    const int64_t rows = block_.rows();
    clear(out_.get(), rows * d_.pitch);
    for (int64_t r = 0; r < rows; ++r) {
      top_[r] = static_cast<C>(-__builtin_inf());
      sum_[r] = 0;
    }
    block_.each_key_block([&](int64_t first, int64_t n) {
      block_.multiply_keys(first, n, s_.get());
      for (int64_t r = 0; r < rows; ++r) accumulate(r, first, n);
      const Factor<C> weights{s_.get(), kScorePitch<C>, 1};
      if (selects)
        multiply_visible(rows, d_.width, n, weights, keys_.v.row(first), d_.pitch, keys_.v.nonfinite(first),
                         clean_.get(), out_.get(), [&](int64_t r, int64_t j) { return block_.sees(r, first + j); });
      else
        multiply<true>(rows, d_.width, n, weights, {keys_.v.row(first), d_.pitch}, Vectors<C>{out_.get(), d_.pitch});
    });
  }

  // Takes a row of products into the sums of its query, and leaves the weights of the values.
  void accumulate(int64_t r, int64_t first, int64_t n) {
    C* const s = s_.get() + r * kScorePitch<C>;
    const PendingBias<C> pending = block_.finish(r, block_.span(r, first, n), first, n, s);
    const C before = top_[r], now = vmax_of(before, largest(s, n, pending));
    const C sum = exponentials(s, n, pending, shift_of(now));
    top_[r] = now;
    // Nothing has been summed where there was no largest score yet.
    const C factor = before == now || sum_[r] == C{0} ? C{1} : vexp2<C>(splat(before - now))[0];
    sum_[r] = sum_[r] * factor + sum;
    if (factor != C{1}) multiply_by(out_.get() + r * d_.pitch, d_.width, factor);
    if (p_.dropout > 0.0) block_.drop(r, first, n, s, keep_.get());
  }

  void write(int64_t r) {
    const int64_t b = block_.batch(), h = block_.head(), i = block_.query(r);
    C* const out = out_.get() + r * d_.pitch;
    const bool sees = sum_[r] != C{0};
    scalar<C>(p_.lse, b, h, i) =
        sees ? static_cast<C>(::log(sum_[r]) + static_cast<C>(kLn2) * top_[r]) : static_cast<C>(-__builtin_inf());
    if (sees)
      multiply_by(out, d_.width, C{1} / sum_[r]);
    else
      clear(out, d_.width);
    if (p_.value_conv.data != nullptr) {
      keys_.convolve(block_.position(r), taps_.get());
      add_to(out, taps_.get(), d_.width, keys_.tables.conv_scale());
    }
    write_row(p_, p_.out, b, i, h, p_.channels, out);
  }

  static C vmax_of(C a, C b) { return a > b ? a : b; }

  const AttentionForward& p_;
  const AttentionData<C>& d_;
  Keys<C> keys_;
  QueryBlock<C> block_;
  Scratch<C> s_, keep_, out_, clean_, taps_;
  C top_[kQueryRows], sum_[kQueryRows];
  bool knows_nonfinite_ = false;
};

template <class C>
inline const char* attention_forward_typed(const AttentionForward& p) {
  const AttentionData<C> data(p);
  const Splits splits(p.batch * p.groups, p.sharing() * data.blocks(), 128, 4);
  parallel(p, splits.tasks(), data.threads, [&](int64_t begin, int64_t end) {
    AttentionForwardTask<C> task(p, data);
    for (int64_t n = begin; n < end; ++n)
      task.run(n / splits.per_group % p.batch, n / splits.per_group / p.batch, splits.of(n));
  });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
