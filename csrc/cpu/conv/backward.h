// tap_grad: all gradients in one sweep over d(y) and x.
//
// d(x) is the convolution of d(y) with the taps in reverse order. d(filters) are partial sums over splits of the rows,
// whose number depends on the problem alone, added in a fixed order, so that the result is the same bit for bit on any
// number of threads.
#pragma once

#include "csrc/cpu/conv/partial_sums.h"

namespace ck::cpu::CK_ISA {

constexpr int64_t kSplitRows = 128, kMaxSplits = 16;

template <class T>
inline RowReader<T> gradient_reader(const ConvBackward& p) {
  RowReader<T> r;
  r.rows = p.grad;
  return r;
}

// Filters that depend on the position where heads do not cover whole units: products per channel first, then one head
// after the other.
template <class Src>
inline void dot_taps_of_channels(const typename Src::Elem* const* in, const typename Src::Elem* grad, int64_t taps,
                                 int64_t units, int64_t channels, int64_t channels_per_head, typename Src::C* product,
                                 typename Src::C* out, int64_t pitch) {
  using C = typename Src::C;
  constexpr int V = kLanes<C>, P = Src::kParts;
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t unit = 0; unit < units; ++unit) {
      store_bytes(product + unit * P * V, Src::template load<0>(grad, unit) * Src::template load<0>(in[k], unit));
      if constexpr (P == 2)
        store_bytes(product + (unit * P + 1) * V,
                    Src::template load<1>(grad, unit) * Src::template load<1>(in[k], unit));
    }
    for (int64_t c = 0; c < channels; ++c) {
      out[(c / channels_per_head * taps + k) * pitch] += product[vector_position<Src>(c)];
    }
  }
}

template <class T, class Blocks>
class BackwardTask {
 public:
  using C = Compute<T>;
  using Src = typename Blocks::Src;
  using Elem = typename Src::Elem;
  using Filters = typename Blocks::Filters;
  static constexpr bool kStaged = Blocks::kStaged;
  static constexpr int64_t kMaxRows = kBackwardRows;

  BackwardTask(const ConvBackward& p, const ChannelPlan& plan, const ChannelBlock& block, const Filters* shared,
               C* filter_sum, C* bias_sum)
      : p_(p),
        plan_(plan),
        block_(block),
        filter_sum_(filter_sum),
        bias_sum_(bias_sum),
        K_(p.taps.taps),
        d_(p.taps.dilation),
        per_head_(p.channels / p.heads),
        h0_(block.first / per_head_),
        h1_(ceil_div(block.last, per_head_)),
        units_(units_of<T>(block)),
        width_(vector_width<T>(block)),
        columns_(kMaxRows + K_ - 1),
        pitch_(round_up(columns_ + kLanes<C>, kLanes<C>)),
        per_row_(shared == nullptr),
        need_input_(p.grad_x.data != nullptr || p.grad_gate.data != nullptr || p.grad_state != nullptr),
        need_filter_(p.grad_weight != nullptr),
        reversed_(p.taps.transposed()),
        // The filters of the rows whose gradient is taken lie among those that d(x) needs if the phases meet.
        centered_(need_input_ && reversed_.left % d_ == 0),
        separate_soft_(need_filter_ && p.dropout > 0.0),
        input_(input_reader<T>(p), p.taps, block, need_filter_ ? kMaxRows : 1, Blocks::rows_behind(true), kStaged),
        gradient_(gradient_reader<T>(p), reversed_, block, need_input_ ? kMaxRows : 1, Blocks::rows_behind(per_row_),
                  kStaged),
        center_(gradient_reader<T>(p), Taps{1, 0, d_}, block, kMaxRows, kMargin, kStaged),
        sink_(input_reader<T>(p), p.grad_x, p.grad_gate, p.grad_state, block, kMaxRows, kStaged),
        filters_(per_row_ && need_input_ ? table_rows() * pitch_ : 0),
        soft_(per_row_ && separate_soft_ && centered_ ? table_rows() * pitch_ : 0),
        center_soft_(per_row_ && need_filter_ && !centered_ ? table_rows() * kMaxRows : 0),
        dots_(per_row_ && need_filter_ ? (table_rows() + kDotTaps<C>)*kMaxRows : 0),
        expanded_(per_row_ && need_input_ && !plan.aligned ? (columns_ + kPositionRows) * K_ * width_ : 0),
        product_(per_row_ && need_filter_ && !plan.aligned ? width_ : 0),
        blocks_(p, plan, block, shared) {}

  void run(const WorkList& work, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Item& item = work.item(index);
      const Sequence& s = work.sequence(item.sequence);
      for (int64_t first = item.first; first < item.last; first += kMaxRows) {
        const int64_t n = min(kMaxRows, item.last - first), position = item.phase + d_ * first;
        const bool continues = first > item.first;
        if (need_input_) input_gradient(s, position, n, continues);
        if (need_filter_ || bias_sum_ != nullptr) row_gradients(s, position, n, continues);
      }
      if (p_.grad_state != nullptr && item.phase == 0 && item.first == 0) state_gradient(s);
    }
    if (need_filter_ && !per_row_) blocks_.finish(filter_sum_);
  }

 private:
  int64_t table_rows() const { return (h1_ - h0_) * K_; }
  PositionBlock block_of(const Sequence& s, int64_t position, int64_t n) const {
    return {p_, s, position, d_, n, h0_, h1_};
  }

  // Inputs before position 0 receive their gradient as if they belonged to the sequence.
  void state_gradient(const Sequence& s) {
    for (int64_t phase = 0; phase < d_; ++phase)
      for (int64_t first = 0; first < K_ - 1; first += kMaxRows)
        input_gradient(s, d_ * first + phase - p_.taps.span(), min(kMaxRows, K_ - 1 - first), first > 0);
  }

  void input_gradient(const Sequence& s, int64_t position, int64_t n, bool continues) {
    const auto grad = gradient_.template move<kStaged>(s, position, n, continues);
    const auto out = sink_.template open<kStaged>(s, position, d_, n);
    if (!per_row_) {
      blocks_.convolve(grad, out, n, continues, nullptr, false, nullptr);
    } else {
      window_filters(s, position, n, continues);
      // Output i takes tap K-1-k of the filter that belongs to row i+k of the window.
      if (plan_.aligned) {
        blocks_.convolve_positions(grad, out, n, continues,
                                   {filters_.get() + (K_ - 1) * pitch_, 1 - pitch_, K_ * pitch_}, nullptr, false,
                                   nullptr);
      } else if constexpr (Blocks::kAnyHeads) {
        const int64_t row = K_ * width_;
        blocks_.convolve_position_channels(grad, out, n, {expanded_.get() + (K_ - 1) * width_, row, row - width_},
                                           nullptr, false, nullptr);
      }
    }
    if constexpr (kStaged) sink_.flush(s, position, d_, n);
  }

  // Filters of the rows that the window of d(y) holds, and zeros where it lies outside the sequence.
  void window_filters(const Sequence& s, int64_t position, int64_t n, bool continues) {
    const int64_t halo = K_ - 1, end = n + halo, origin = reversed_.source(position, 0);
    C* const soft = separate_soft_ && centered_ ? soft_.get() : nullptr;
    const int64_t begin = continues ? halo : 0, row = K_ * width_;
    if (continues) {
      move_columns(filters_.get(), pitch_, table_rows(), kMaxRows, halo);
      if (soft != nullptr) move_columns(soft, pitch_, table_rows(), kMaxRows, halo);
      if (!plan_.aligned)
        memmove(static_cast<void*>(expanded_.get()), expanded_.get() + kMaxRows * row,
                static_cast<size_t>(halo * row) * sizeof(C));
    }
    // Columns [first, last) are inside.
    const int64_t first = min(end, max(begin, ceil_div(max(0, -origin), d_)));
    const int64_t last = max(first, min(end, ceil_div(max(0, s.length() - origin), d_)));
    if (first < last)
      make_position_filters<C>(block_of(s, origin + d_ * first, last - first), filters_.get() + first,
                               soft != nullptr ? soft + first : nullptr, pitch_);
    for (int64_t j = 0; (begin < first || last < end) && j < table_rows(); ++j) {
      C* const to = filters_.get() + j * pitch_;
      for (int64_t i = begin; i < first; ++i) to[i] = 0;
      for (int64_t i = last; i < end; ++i) to[i] = 0;
    }
    if (!plan_.aligned)
      for (int64_t i = begin; i < end; ++i)
        expand_filters<T>(p_, block_, filters_.get() + i, K_ * pitch_, pitch_, expanded_.get() + i * row);
  }

  void row_gradients(const Sequence& s, int64_t position, int64_t n, bool continues) {
    const auto grad = center_.template move<kStaged>(s, position, n, false);
    if (bias_sum_ != nullptr) add_bias(grad, n);
    if (!need_filter_) return;
    const auto in = input_.template move<kStaged>(s, position, n, continues);
    if (per_row_) return position_gradients(s, position, n, continues, in, grad);
    blocks_.correlate(in, grad, n, continues, filter_sum_);
  }

  void add_bias(const Elem* const* grad, int64_t n) {
    constexpr int V = kLanes<C>, P = Src::kParts;
    for (int64_t unit = 0; unit < units_; ++unit) {
      C* const to = bias_sum_ + block_.first + unit * P * V;
      Vec<C> low = load_bytes<Vec<C>>(to);
      for (int64_t i = 0; i < n; ++i) low += Src::template load<0>(grad[i], unit);
      store_bytes(to, low);
      if constexpr (P == 2) {
        Vec<C> high = load_bytes<Vec<C>>(to + V);
        for (int64_t i = 0; i < n; ++i) high += Src::template load<1>(grad[i], unit);
        store_bytes(to + V, high);
      }
    }
  }

  // d(filters), through the softmax, to d(weight) or, if all positions share the weight, to the sums.
  void position_gradients(const Sequence& s, int64_t position, int64_t n, bool continues, const Elem* const* in,
                          const Elem* const* grad) {
    C* const dots = dots_.get();
    if (plan_.aligned) {
      blocks_.correlate_positions(in, grad, n, continues, dots, kMaxRows);
    } else {
      memset(static_cast<void*>(dots), 0, static_cast<size_t>(table_rows() * kMaxRows) * sizeof(C));
      for (int64_t i = 0; i < n; ++i)
        dot_taps_of_channels<Src>(in + i, grad[i], K_, units_, block_.size(), per_head_, product_.get(), dots + i,
                                  kMaxRows);
    }
    const PositionBlock block = block_of(s, position, n);
    if (centered_) {
      const C* const soft = (separate_soft_ ? soft_ : filters_).get() + gradient_.center();
      finish_position_gradient<C>(block, soft, pitch_, dots, kMaxRows);
    } else {
      ConvProblem undropped = p_;
      undropped.dropout = 0.0;
      make_position_filters<C>({undropped, s, position, d_, n, h0_, h1_}, center_soft_.get(), nullptr, kMaxRows);
      finish_position_gradient<C>(block, center_soft_.get(), kMaxRows, dots, kMaxRows);
    }
    store_gradient(s, position, n);
  }

  void store_gradient(const Sequence& s, int64_t position, int64_t n) {
    if (!p_.per_position) {
      C* const to = filter_sum_ + h0_ * K_;
      for (int64_t j = 0; j < table_rows(); ++j)
        for (int64_t i = 0; i < n; ++i) to[j] += dots_[j * kMaxRows + i];
      return;
    }
    const int64_t at = ((s.batch * p_.time + s.begin + position) * p_.heads + h0_) * K_;
    with_dtype(p_.weight_dtype, [&](auto* tag) {
      using W = __typeof__(*tag);
      if constexpr (std::is_same_v<Compute<W>, C>)
        store_columns<W>(dots_.get(), kMaxRows, n, table_rows(), static_cast<W*>(p_.grad_weight) + at,
                         d_ * p_.heads * K_);
    });
  }

  const ConvBackward& p_;
  const ChannelPlan& plan_;
  const ChannelBlock block_;
  C *const filter_sum_, *const bias_sum_;
  const int64_t K_, d_, per_head_, h0_, h1_, units_, width_, columns_, pitch_;
  const bool per_row_, need_input_, need_filter_;
  const Taps reversed_;
  const bool centered_, separate_soft_;
  InputWindow<T, Src> input_, gradient_, center_;
  Sink<T, Src> sink_;
  Scratch<C> filters_, soft_, center_soft_, dots_, expanded_, product_;
  Blocks blocks_;
};

// Whether rows are read and written where they lie.
template <class T>
inline bool rows_in_place(const ConvBackward& p) {
  return kReadInPlace<T> && p.gate.data == nullptr && p.grad.channel == 1 &&
         (p.grad_weight == nullptr || p.x.channel == 1) && (p.grad_x.data == nullptr || p.grad_x.channel == 1) &&
         (p.grad_state == nullptr || p.grad_x.data != nullptr);
}

// Blocks: what computes rows that are read in place.
template <class T, class Blocks = VectorBlocks<T, false>>
inline const char* conv_backward_typed(const ConvBackward& p) {
  using C = Compute<T>;
  using Filters = typename Blocks::Filters;
  const bool per_row = p.per_position || p.renormalize, direct = rows_in_place<T>(p);
  const int64_t splits = max(1, min(kMaxSplits, p.batch * p.time / kSplitRows));
  const ChannelPlan plan = plan_channels<T>(p, direct, per_row, channels_per_block(p, direct, splits));
  const int64_t rows = max(16, min(256, round_up(ceil_div(p.batch * p.time, splits), 16)));
  const WorkList work(p, rows);

  const int64_t K = p.taps.taps, padded = round_up(p.channels, Lanes<T>::kUnit);
  const bool shared_sums = p.grad_weight != nullptr && !p.per_position;
  const int64_t filter_size = !shared_sums   ? 0
                              : per_row      ? p.heads * K
                              : plan.aligned ? p.heads * K * kLanes<C>
                                             : padded * K;
  PartialSums<C> sums(splits, filter_size, p.grad_bias != nullptr ? padded : 0);

  const auto run = [&](const Filters* shared) {
    parallel(p, splits * plan.blocks, worth_threads(p), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        // Blocks of the same rows next to each other: neighbours share what they bring into the caches.
        const int64_t split = task / plan.blocks;
        const ChannelBlock block = plan.block(task % plan.blocks, p.channels);
        C* const filter_sum = sums.filters.get() + split * filter_size;
        C* const bias_sum = p.grad_bias != nullptr ? sums.bias.get() + split * padded : nullptr;
        const int64_t per_head = p.channels / p.heads, width = vector_width<T>(block);
        if (shared_sums) {
          const int64_t h0 = block.first / per_head, h1 = ceil_div(block.last, per_head);
          const int64_t scale = per_row ? K : plan.aligned ? K * kLanes<C> : 0;
          C* const from = scale != 0 ? filter_sum + h0 * scale : filter_sum + block.first * K;
          const int64_t count = scale != 0 ? (h1 - h0) * scale : width * K;
          memset(static_cast<void*>(from), 0, static_cast<size_t>(count) * sizeof(C));
        }
        if (bias_sum != nullptr)
          memset(static_cast<void*>(bias_sum + block.first), 0, static_cast<size_t>(width) * sizeof(C));
        const int64_t first = work.size() * split / splits, last = work.size() * (split + 1) / splits;
        if (!block.staged) {
          if constexpr (kReadInPlace<T>)
            BackwardTask<T, Blocks>(p, plan, block, shared, filter_sum, bias_sum).run(work, first, last);
        } else if constexpr (Blocks::kAnyHeads) {
          BackwardTask<T, typename Blocks::OfConverted>(p, plan, block, shared, filter_sum, bias_sum)
              .run(work, first, last);
        }
      }
    });
    if (shared_sums) reduce_filters<T>(p, plan, sums, splits, shared);
    if (p.grad_bias != nullptr) reduce_bias<T>(p, plan, sums, splits);
  };
  if (per_row) {
    run(nullptr);
  } else {
    const Filters shared(p, plan, true, true);
    run(&shared);
  }
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
