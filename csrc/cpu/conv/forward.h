// tap_conv: the forward pass.
#pragma once

#include "csrc/cpu/conv/convolve.h"
#include "csrc/cpu/conv/position_filters.h"
#include "csrc/cpu/conv/rows.h"

namespace ck::cpu::CK_ISA {

// Below this many multiply-adds starting threads costs more than it gives.
constexpr int64_t kSerialWork = 1 << 15;

// Rows of an item at least: a whole number of vectors, and of tiles.
constexpr int64_t kMinRows = 16;

inline bool worth_threads(const ConvProblem& p) { return p.batch * p.time * p.channels * p.taps.taps >= kSerialWork; }

template <class T>
inline RowReader<T> input_reader(const ConvProblem& p) {
  RowReader<T> r;
  r.rows = p.x;
  r.gate = p.gate;
  r.mask = p.mask;
  r.mask_batch = p.mask_batch;
  r.mask_time = p.mask_time;
  r.state = static_cast<const T*>(p.state);
  r.span = p.taps.span();
  r.channels = p.channels;
  return r;
}

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

// The bias of a block, converted like its rows.
template <class T>
inline void convert_bias(const ConvProblem& p, const ChannelBlock& block, Compute<T>* out) {
  memset(static_cast<void*>(out), 0, static_cast<size_t>(vector_width<T>(block)) * sizeof(*out));
  with_dtype(p.bias_dtype, [&](auto* tag) {
    const auto* bias = static_cast<decltype(tag)>(const_cast<void*>(p.bias)) + block.first;
    for (int64_t c = 0; c < block.size(); ++c) out[vector_position<Lanes<T>>(c)] = to_float(bias[c]);
  });
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

// Outputs larger than this do not stay in the caches, so they are stored past them.
constexpr int64_t kStreamBytes = 24 << 20;

// Rows of `out` lie so that whole vectors can be streamed.
template <class T>
inline bool can_stream(const Rows& out) {
  const auto unaligned = [](int64_t elements) {
    return elements * static_cast<int64_t>(sizeof(T)) % kVectorBytes != 0;
  };
  return out.channel == 1 && reinterpret_cast<uintptr_t>(out.data) % kVectorBytes == 0 && !unaligned(out.time) &&
         !unaligned(out.batch);
}

// Filters shared by all positions, in the forms that the tiles take.
template <class T>
class SharedFilters {
 public:
  using C = Compute<T>;

  SharedFilters(const ConvProblem& p, const ChannelPlan& plan, bool transpose, bool keep_soft)
      : pitch_(shared_pitch(p)),
        table_(p.taps.taps * pitch_),
        soft_(keep_soft && p.dropout > 0.0 ? p.taps.taps * pitch_ : 0),
        // With one head per channel the table is expanded as it stands, unless rows are split into parts.
        tabled_(p.heads == p.channels && Lanes<T>::kParts == 1),
        expanded_(plan.aligned || tabled_ ? 0 : p.taps.taps * round_up(p.channels, Lanes<T>::kUnit)) {
    const bool separate = keep_soft && p.dropout > 0.0;
    make_shared_filters<C>(p, table_.get(), separate ? soft_.get() : nullptr);
    soft_data_ = separate ? soft_.get() : table_.get();
    if (!plan.aligned && !tabled_) {
      const int64_t K = p.taps.taps;
      parallel(p, plan.blocks, p.channels * K >= kSerialWork, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const ChannelBlock block = plan.block(i, p.channels);
          expand_filters<T>(p, block, table_.get(), 1, pitch_, expanded_.get() + block.first * K);
        }
      });
    }
    last_ = transpose ? p.taps.taps - 1 : 0;
    sign_ = transpose ? -1 : 1;
  }

  // Convolves n rows of a block whose first head is h0.
  template <class Src>
  void convolve_block(const ConvProblem& p, const ChannelPlan& plan, const ChannelBlock& block, int64_t h0,
                      const typename Src::Elem* const* in, typename Src::Elem* const* out, int64_t n, const C* bias,
                      bool stream) const {
    const int64_t units = units_of<T>(block), K = p.taps.taps, width = vector_width<T>(block);
    if (plan.aligned) {
      const SharedTaps<C> filter{table_.get() + h0 + last_ * pitch_, sign_ * pitch_, 1};
      Convolve<Src, SharedTaps<C>>::rows(in, out, n, K, units, p.channels / p.heads / Lanes<T>::kUnit, filter, bias,
                                         stream);
    } else {
      const int64_t stride = tabled_ ? pitch_ : width;
      const C* const from = tabled_ ? table_.get() + block.first : expanded_.get() + block.first * K;
      const ChannelTaps<C> filter{from + last_ * stride, sign_ * stride};
      Convolve<Src, ChannelTaps<C>>::rows(in, out, n, K, units, units, filter, bias, stream);
    }
  }
  const C* soft() const { return soft_data_; }

 private:
  int64_t pitch_, last_ = 0, sign_ = 1;
  Scratch<C> table_, soft_;
  bool tabled_;
  Scratch<C> expanded_;
  const C* soft_data_ = nullptr;
};

// Convolves n rows with filters that depend on the position, where heads cover whole units: `filters` as in
// PositionTaps, of a table with `pitch`.
template <class T, class Src>
inline void convolve_positions(const ConvProblem& p, const ChannelBlock& block, const typename Src::Elem* const* in,
                               typename Src::Elem* const* out, int64_t n, const Compute<T>* filters, int64_t tap,
                               int64_t pitch, const Compute<T>* bias, bool stream) {
  const int64_t K = p.taps.taps;
  Convolve<Src, PositionTaps<Compute<T>>>::rows(in, out, n, K, units_of<T>(block),
                                                p.channels / p.heads / Lanes<T>::kUnit, {filters, tap, K * pitch}, bias,
                                                stream);
}

// The same where they do not: with filters expanded to channels, `row` and `tap` as in PositionChannelTaps.
template <class T, class Src>
inline void convolve_position_channels(const ConvProblem& p, const ChannelBlock& block,
                                       const typename Src::Elem* const* in, typename Src::Elem* const* out, int64_t n,
                                       const Compute<T>* filters, int64_t row, int64_t tap, const Compute<T>* bias,
                                       bool stream) {
  const int64_t units = units_of<T>(block);
  Convolve<Src, PositionChannelTaps<Compute<T>>>::rows(in, out, n, p.taps.taps, units, units, {filters, row, tap}, bias,
                                                       stream);
}

template <class T, bool kStaged>
inline void forward_task(const ConvForward& p, const ChannelPlan& plan, const ChannelBlock& block, const WorkList& work,
                         int64_t begin, int64_t end, const SharedFilters<T>* shared, bool stream) {
  using C = Compute<T>;
  using Src = std::conditional_t<kStaged, Staged<T>, Lanes<T>>;
  const int64_t K = p.taps.taps, d = p.taps.dilation, per_head = p.channels / p.heads;
  const int64_t h0 = block.first / per_head, h1 = ceil_div(block.last, per_head);
  const int64_t max_rows = shared != nullptr ? 64 : kMinRows;
  // With position-dependent filters: a table of them, and a row for each output, expanded to channels, where heads are
  // unaligned.
  constexpr int64_t pitch = kMinRows;
  const int64_t width = vector_width<T>(block);
  Scratch<C> filters(shared != nullptr ? 0 : (h1 - h0) * K * pitch);
  Scratch<C> expanded(shared != nullptr || plan.aligned ? 0 : (max_rows + kPositionRows) * K * width);
  Scratch<C> bias(p.bias != nullptr ? width : 0);
  const RowReader<T> reader = input_reader<T>(p);
  InputWindow<T, Src> window(reader, p.taps, block, max_rows, shared != nullptr ? kMargin : kBlockMargin, kStaged);
  Sink<T, Src> staged_sink(RowReader<T>{p.y, {}}, p.y, {}, nullptr, block, max_rows, kStaged);
  const C* const bias_row = p.bias != nullptr ? bias.get() : nullptr;
  if (p.bias != nullptr) convert_bias<T>(p, block, bias.get());

  for (int64_t index = begin; index < end; ++index) {
    const Item& item = work.item(index);
    const Sequence& s = work.sequence(item.sequence);
    for (int64_t first = item.first; first < item.last; first += max_rows) {
      const int64_t n = min(max_rows, item.last - first), position = item.phase + d * first;
      const auto in = window.template move<kStaged>(s, position, n, first > item.first);
      const auto out = staged_sink.template open<kStaged>(s, position, d, n);
      if (shared != nullptr) {
        shared->template convolve_block<Src>(p, plan, block, h0, in, out, n, bias_row, stream);
      } else {
        make_position_filters<C>({p, s, position, d, n, h0, h1}, filters.get(), nullptr, pitch);
        if (plan.aligned) {
          convolve_positions<T, Src>(p, block, in, out, n, filters.get(), pitch, pitch, bias_row, stream);
        } else {
          const int64_t row = K * width;
          for (int64_t i = 0; i < n; ++i)
            expand_filters<T>(p, block, filters.get() + i, K * pitch, pitch, expanded.get() + i * row);
          convolve_position_channels<T, Src>(p, block, in, out, n, expanded.get(), row, width, bias_row, stream);
        }
      }
      if constexpr (kStaged) staged_sink.flush(s, position, d, n);
    }
  }
  if (stream) stream_fence();
}

template <class T>
inline const char* conv_forward_typed(const ConvForward& p) {
  if (p.batch * p.time * p.channels == 0) return nullptr;
  const bool per_row = p.per_position || p.renormalize;
  const bool direct = kReadInPlace<T> && p.gate.data == nullptr && p.x.channel == 1 && p.y.channel == 1;
  const bool threads = worth_threads(p);
  const int64_t min_channels = channels_per_block(p, direct, ceil_div(p.batch * p.time, kMinRows));
  const ChannelPlan plan = plan_channels<T>(p, direct, per_row, min_channels);
  const int64_t tasks = threads ? max(1, p.threads * 4 / plan.blocks) : 1;
  const int64_t rows = max(kMinRows, min(256, round_up(ceil_div(p.batch * p.time, tasks), kMinRows)));
  const WorkList work(p, rows);
  const bool stream = direct && p.batch * p.time * p.channels * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
                      p.resident_output && can_stream<T>(p.y);
  const auto run = [&](const SharedFilters<T>* shared) {
    parallel(p, work.size() * plan.blocks, threads, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t i = begin / work.size(), first = begin % work.size();
        const int64_t last = min(work.size(), first + end - begin);
        const ChannelBlock block = plan.block(i, p.channels);
        if (block.staged) {
          forward_task<T, true>(p, plan, block, work, first, last, shared, false);
        } else if constexpr (kReadInPlace<T>) {
          forward_task<T, false>(p, plan, block, work, first, last, shared, stream);
        }
        begin += last - first;
      }
    });
  };
  if (per_row) {
    run(nullptr);
  } else {
    const SharedFilters<T> shared(p, plan, false, false);
    run(&shared);
  }
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
