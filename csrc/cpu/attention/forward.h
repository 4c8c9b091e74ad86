// attention: the forward pass. Each block of queries walks over the keys once, keeping the sum of the exponentials and
// the unnormalised result of each row; also the largest score, to which these are relative, of rows where scores may be
// large.
#pragma once

#include "csrc/cpu/attention/bound.h"

namespace ck::cpu::CK_ISA {

template <class C>
class AttentionForwardTask {
 public:
  AttentionForwardTask(const AttentionForward& p, const AttentionData<C>& data)
      : p_(p),
        d_(data),
        keys_(data, false),
        block_(data, keys_),
        bound_(keys_, block_),
        s_(kQueryRows * kScorePitch<C>),
        keep_(p.dropout > 0.0 ? kKeyColumns : 0),
        out_(kQueryRows * data.pitch),
        clean_(kKeyColumns * data.pitch),
        taps_(p.value_conv.data != nullptr ? data.width : 0),
        sums_(kQueryRows * V) {}

  // Blocks `range` of the heads of one group, which follow each other.
  void run(int64_t b, int64_t g, Range range) {
    keys_.load(b, g);
    knows_nonfinite_ = knows_tiny_ = false;
    for (int64_t n = range.first; n < range.end; ++n) {
      keys_.choose_head(g * p_.sharing() + n / d_.blocks());
      bound_.choose_head();
      run_block(n % d_.blocks());
    }
  }

 private:
  static constexpr int V = kLanes<C>;

  void run_block(int64_t block) {
    block_.load(block);
    bound_.find(direct_);
    walk(false);
    const int64_t rows = block_.rows();
    const Extent found = extent(0, rows);
    if (!found.finite) {  // perhaps by a value that some rows do not see
      if (!knows_nonfinite_) keys_.v.find_nonfinite();
      knows_nonfinite_ = true;
      walk(true);
    }
    // Before values may decide that maxima are subtracted: they have no influence on lse.
    for (int64_t r = 0; r < rows; ++r) write_lse(r);
    if ((!found.finite || found.tiny) && subtract_maxima()) walk(!found.finite);
    for (int64_t r = 0; r < rows; ++r) write(r);
  }

  // Leaves the unnormalised results. selects: values that are not finite go to those alone who see them.
  void walk(bool selects) {
    const int64_t rows = block_.rows();
    clear(out_.get(), rows * d_.pitch);
    clear(sums_.get(), rows * V);
    for (int64_t r = 0; r < rows; ++r) {
      top_[r] = direct_[r] ? C{0} : static_cast<C>(-__builtin_inf());
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
    for (int64_t r = 0; r < rows; ++r)
      if (direct_[r]) sum_[r] = sum_lanes<C>(load_bytes<Vec<C>>(sums_.get() + r * V));
  }

  // Takes a row of products into the sums of its query, and leaves the weights of the values.
  void accumulate(int64_t r, int64_t first, int64_t n) {
    C* const s = s_.get() + r * kScorePitch<C>;
    const PendingBias<C> pending = block_.finish(r, block_.span(r, first, n), first, n, s);
    if (direct_[r]) {
      C* const sums = sums_.get() + r * V;
      store_bytes(sums, direct_exponentials(s, n, pending, load_bytes<Vec<C>>(sums)));
    } else {
      const C before = top_[r], now = vmax_of(before, largest(s, n, pending));
      const C sum = exponentials(s, n, pending, shift_of(now));
      top_[r] = now;
      // Nothing has been summed where there was no largest score yet.
      const C factor = before == now || sum_[r] == C{0} ? C{1} : vexp2<C>(splat(before - now))[0];
      sum_[r] = sum_[r] * factor + sum;
      if (factor != C{1}) multiply_by(out_.get() + r * d_.pitch, d_.width, factor);
    }
    if (p_.dropout > 0.0) block_.drop(r, first, n, s, keep_.get());
  }

  // What is known of the unnormalised results of some rows.
  struct Extent {
    bool finite, tiny;  // all are numbers; some are nearly 0
  };
  Extent extent(int64_t from, int64_t to) const {
    Vec<C> zero = {}, least = splat(C{1}), padding = {};
    for (int64_t c = p_.channels; c < d_.width; ++c) padding[c % V] = 1;
    for (int64_t r = from; r < to; ++r)
      for (int64_t i = 0; i < d_.width; i += V) {
        const Vec<C> x = load_bytes<Vec<C>>(out_.get() + r * d_.pitch + i);
        zero += x * C{0};
        Vec<C> size = vmax<C>(x, -x);
        if (i + V > p_.channels) size = vmax<C>(size, padding);
        least = size < least ? size : least;
      }
    return {sum_lanes<C>(zero) == C{0}, -max_lanes<C>(-least) < static_cast<C>(kTinySum)};
  }

  // Rows whose sums left the range of numbers because no maximum was subtracted have it subtracted from now on. Returns
  // whether there are any.
  bool subtract_maxima() {
    bool any = false;
    for (int64_t r = 0; r < block_.rows(); ++r) {
      if (!direct_[r] || sum_[r] == C{0}) continue;
      const Extent found = extent(r, r + 1);
      if (found.tiny && !knows_tiny_) keys_.v.find_tiny(static_cast<C>(kTinyValue));
      knows_tiny_ = knows_tiny_ || found.tiny;
      const Range& visible = block_.position(r).visible;
      direct_[r] = found.finite && !(found.tiny && keys_.v.has_tiny(visible.first, visible.end - visible.first));
      any = any || !direct_[r];
    }
    return any;
  }

  void write_lse(int64_t r) const {
    scalar<C>(p_.lse, block_.batch(), block_.head(), block_.query(r)) =
        sum_[r] != C{0} ? static_cast<C>(::log(sum_[r]) + static_cast<C>(kLn2) * top_[r])
                        : static_cast<C>(-__builtin_inf());
  }

  void write(int64_t r) {
    const int64_t b = block_.batch(), h = block_.head(), i = block_.query(r);
    C* const out = out_.get() + r * d_.pitch;
    if (sum_[r] != C{0})
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
  ScoreBound<C> bound_;
  Scratch<C> s_, keep_, out_, clean_, taps_;
  Scratch<C> sums_;          // of the exponentials of direct rows, by lanes
  bool direct_[kQueryRows];  // nothing is subtracted from the scores
  C top_[kQueryRows], sum_[kQueryRows];
  bool knows_nonfinite_ = false, knows_tiny_ = false;
};

template <class C>
inline const char* attention_forward_typed(const AttentionForward& p) {
  const AttentionData<C> data(p);
  // Rows of queries do not depend on each other, so that the number of threads may decide.
  const Splits splits(p.batch * p.groups, p.sharing() * data.blocks(), 4 * p.threads, 4);
  parallel(p, splits.tasks(), data.threads, [&](int64_t begin, int64_t end) {
    AttentionForwardTask<C> task(p, data);
    for (int64_t n = begin; n < end; ++n)
      task.run(n / splits.per_group % p.batch, n / splits.per_group / p.batch, splits.of(n));
  });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
