// How a call is cut along channels, and the arithmetic on blocks of rows.
#pragma once

#include "csrc/cpu/conv/convolve.h"
#include "csrc/cpu/conv/correlate.h"
#include "csrc/cpu/conv/filters.h"
#include "csrc/cpu/conv/rows.h"

namespace ck::cpu::CK_ISA {

// Below this many multiply-adds starting threads costs more than it gives.
constexpr int64_t kSerialWork = 1 << 15;

inline bool worth_threads(const ConvProblem& p) { return p.batch * p.time * p.channels * p.taps.taps >= kSerialWork; }

// How a call is cut along channels. Heads that cover whole units take one filter value for a whole vector; otherwise
// filters are expanded to channels.
struct ChannelPlan {
  bool aligned;       // heads cover whole units
  int64_t main;       // channels that can be read and written in place
  int64_t per_block;  // channels of a block in that part
  int64_t blocks;
  bool direct;  // rows of the main part are read and written in place

  ChannelBlock block(int64_t i, int64_t channels) const {
    const int64_t first = i * per_block;
    if (first >= main) return {main, channels, true};
    return {first, min(first + per_block, main), !direct};
  }
};

// Blocks of at least `min_channels`, of whole heads. Position-dependent filters of unaligned heads stay in one block.
template <class T>
inline ChannelPlan plan_channels(const ConvProblem& p, bool direct, bool per_row, int64_t min_channels) {
  constexpr int64_t U = Lanes<T>::kUnit;
  const int64_t per_head = p.channels / p.heads;
  ChannelPlan plan{};
  plan.aligned = per_head % U == 0;
  plan.direct = direct;
  if (plan.aligned) {
    plan.main = p.channels;
    plan.per_block = round_up(min(min_channels, p.channels), per_head);
  } else if (per_row) {
    plan.direct = direct && p.channels % U == 0;
    plan.main = plan.per_block = p.channels;
  } else {
    plan.main = direct ? p.channels / U * U : p.channels;
    plan.per_block = min(round_up(min_channels, U), max(plan.main, U));
  }
  plan.blocks = ceil_div(plan.main, plan.per_block) + (plan.main < p.channels ? 1 : 0);
  return plan;
}

// The channels of a block at least, where tasks have `pieces` of the rows to choose from. Rows that lie in place are
// read from end to end, because the hardware's prefetch breaks off where a block ends, unless that leaves fewer than
// two tasks for a thread. Converted rows are to stay in the caches.
inline int64_t channels_per_block(const ConvProblem& p, bool direct, int64_t pieces) {
  constexpr int64_t kNarrow = 256;
  if (!direct) return kNarrow;
  const int64_t blocks = worth_threads(p) ? ceil_div(2 * p.threads, pieces) : 1;
  return max(kNarrow, ceil_div(p.channels, blocks));
}

// Filters expanded to channels: [taps][channels of the block, converted like rows].
template <class T>
inline void expand_filters(const ConvProblem& p, const ChannelBlock& block, const Compute<T>* filters,
                           int64_t head_stride, int64_t tap_stride, Compute<T>* out) {
  const int64_t per_head = p.channels / p.heads, width = vector_width<T>(block);
  const int64_t first_head = block.first / per_head;
  for (int64_t k = 0; k < p.taps.taps; ++k) {
    const Compute<T>* value = filters + first_head * head_stride + k * tap_stride;
    Compute<T>* const row = out + k * width;
    int64_t left = per_head - block.first % per_head;  // channels until the next head
    for (int64_t c = 0; c < block.size(); ++c) {
      row[vector_position<Lanes<T>>(c)] = *value;
      if (--left == 0) {
        left = per_head;
        value += head_stride;
      }
    }
    // Lanes behind the last channel are computed with and never stored.
    for (int64_t c = block.size(); c < width; ++c) row[vector_position<Lanes<T>>(c)] = 0;
  }
}

// Filters shared by all positions, in the forms that the tiles take.
template <class T>
class SharedFilters {
 public:
  using C = Compute<T>;

  SharedFilters(const ConvProblem& p, const ChannelPlan& plan, bool transpose, bool keep_soft)
      : pitch_(shared_pitch(p)),
        as_given_(p.heads == p.channels && !plan.aligned && !p.softmax && p.dropout == 0.0 &&
                  p.weight_dtype == p.dtype && p.weight_tap == 1),
        // With one head per channel the table is expanded as it stands, unless rows are split into parts.
        tabled_(p.heads == p.channels && Lanes<T>::kParts == 1 && !as_given_),
        table_(as_given_ ? 0 : p.taps.taps * pitch_),
        soft_(keep_soft && p.dropout > 0.0 ? p.taps.taps * pitch_ : 0),
        expanded_(plan.aligned || tabled_ ? 0 : p.taps.taps * round_up(p.channels, Lanes<T>::kUnit)) {
    const bool separate = keep_soft && p.dropout > 0.0;
    if (!as_given_) make_shared_filters<C>(p, table_.get(), separate ? soft_.get() : nullptr);
    soft_data_ = separate ? soft_.get() : table_.get();
    if (!plan.aligned && !tabled_) {
      const int64_t K = p.taps.taps;
      parallel(p, plan.blocks, p.channels * K >= kSerialWork, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const ChannelBlock block = plan.block(i, p.channels);
          C* const out = expanded_.get() + block.first * K;
          if (as_given_) {
            const T* const weight = static_cast<const T*>(p.weight) + block.first * p.weight_head;
            load_transposed<T>(weight, p.weight_head, K, block, out);
          } else {
            expand_filters<T>(p, block, table_.get(), 1, pitch_, out);
          }
        }
      });
    }
    last_ = transpose ? p.taps.taps - 1 : 0;
    sign_ = transpose ? -1 : 1;
  }

  // From a head on that covers whole units.
  SharedTaps<C> of_heads(int64_t h0) const { return {table_.get() + h0 + last_ * pitch_, sign_ * pitch_, 1}; }
  // Of a block of channels whose heads do not.
  ChannelTaps<C> of_channels(const ConvProblem& p, const ChannelBlock& block) const {
    const int64_t stride = tabled_ ? pitch_ : vector_width<T>(block);
    const C* const from = tabled_ ? table_.get() + block.first : expanded_.get() + block.first * p.taps.taps;
    return {from + last_ * stride, sign_ * stride};
  }
  const C* soft() const { return soft_data_; }

 private:
  int64_t pitch_, last_ = 0, sign_ = 1;
  const bool as_given_;  // weights are the filters of channels, and need but be converted like rows
  const bool tabled_;
  Scratch<C> table_, soft_, expanded_;
  const C* soft_data_ = nullptr;
};

// The arithmetic of a task on blocks of rows, by vectors, for any problem. Rows are converted first or read in place.
// Kernel sets with tiles have a class with the same members for the problems that it serves (tiles/blocks.h), to which
// `continues` says that a block follows that of the call before, so that the windows overlap.
template <class T, bool kConverted>
class VectorBlocks {
 public:
  using C = Compute<T>;
  using Src = std::conditional_t<kConverted, Staged<T>, Lanes<T>>;
  using Elem = typename Src::Elem;
  using Filters = SharedFilters<T>;
  using OfConverted = VectorBlocks<T, true>;
  static constexpr bool kStaged = kConverted, kAnyHeads = true;  // also heads that do not cover whole units
  static constexpr int64_t kBlockRows = 64;                      // of the forward pass, with filters that rows share
  // That are looked at behind a window, and where the next block is asked for.
  static constexpr int64_t rows_behind(bool block_ahead) { return block_ahead ? kBlockMargin : kMargin; }

  VectorBlocks(const ConvProblem& p, const ChannelPlan& plan, const ChannelBlock& block, const Filters* shared)
      : aligned_(plan.aligned),
        block_(block),
        shared_(shared),
        p_(p),
        K_(p.taps.taps),
        h0_(block.first / (p.channels / p.heads)),
        heads_(ceil_div(block.last, p.channels / p.heads) - h0_),
        units_(units_of<T>(block)),
        units_per_head_(p.channels / p.heads / Lanes<T>::kUnit) {}

  // n rows with filters that all positions share.
  void convolve(const Elem* const* in, Elem* const* out, int64_t n, bool, const C* bias, bool stream,
                const Epilogue<Src>* finish) {
    if (aligned_) {
      Convolve<Src, SharedTaps<C>>::rows(in, out, n, K_, units_, units_per_head_, shared_->of_heads(h0_), bias, stream,
                                         finish);
    } else {
      Convolve<Src, ChannelTaps<C>>::rows(in, out, n, K_, units_, units_, shared_->of_channels(p_, block_), bias,
                                          stream, finish);
    }
  }
  // With filters that depend on the position, where heads cover whole units; and where they do not, with filters
  // expanded to channels.
  void convolve_positions(const Elem* const* in, Elem* const* out, int64_t n, bool, const PositionTaps<C>& filters,
                          const C* bias, bool stream, const Epilogue<Src>* finish) {
    Convolve<Src, PositionTaps<C>>::rows(in, out, n, K_, units_, units_per_head_, filters, bias, stream, finish);
  }
  void convolve_position_channels(const Elem* const* in, Elem* const* out, int64_t n,
                                  const PositionChannelTaps<C>& filters, const C* bias, bool stream,
                                  const Epilogue<Src>* finish) {
    Convolve<Src, PositionChannelTaps<C>>::rows(in, out, n, K_, units_, units_, filters, bias, stream, finish);
  }

  // Adds the gradient of filters that n rows share to the sums of a split: a vector for each tap of each head, or for
  // each tap of each vector of channels.
  void correlate(const Elem* const* in, const Elem* const* grad, int64_t n, bool, C* sums) {
    if (aligned_) {
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t first = h * units_per_head_, last = first + units_per_head_;
        prefetch_rows<Src, kRead>(in + n + K_ - 1, n, first, last);
        Correlate<Src>::heads(in, grad, n, K_, first, last, sums + (h0_ + h) * K_ * kLanes<C>, kLanes<C>);
      }
    } else {
      Correlate<Src>::channels(in, grad, n, K_, 0, units_, sums + block_.first * K_, vector_width<T>(block_));
    }
  }
  // Adds what is not in the sums yet.
  void finish(C*) {}

  // The gradient of filters that depend on the position, of heads that cover whole units: columns of a table.
  void correlate_positions(const Elem* const* in, const Elem* const* grad, int64_t n, bool, C* dots, int64_t pitch) {
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t first = h * units_per_head_, last = first + units_per_head_;
      for (int64_t i = 0; i < n; i += kDotRows) {
        prefetch_rows<Src, kRead>(in + n + K_ - 1 + i, kDotRows, first, last);
        Correlate<Src>::positions(in + i, grad + i, K_, first, last, dots + h * K_ * pitch + i, pitch);
      }
    }
  }

 private:
  const bool aligned_;
  const ChannelBlock block_;
  const Filters* const shared_;
  const ConvProblem& p_;
  const int64_t K_, h0_, heads_, units_, units_per_head_;
};

}  // namespace ck::cpu::CK_ISA
