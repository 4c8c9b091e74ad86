// tap_conv: the forward pass.
#pragma once

#include <optional>

#include "csrc/cpu/conv/blocks.h"
#include "csrc/cpu/conv/position_filters.h"

namespace ck::cpu::CK_ISA {

// Rows of an item at least: a whole number of vectors, and of tiles.
constexpr int64_t kMinRows = 16;

template <class T>
inline RowReader<T> input_reader(const ConvProblem& p) {
  RowReader<T> r;
  r.rows = p.x;
  r.gate = p.gate;
  r.gate_activation = p.gate_activation;
  r.mask = p.mask;
  r.mask_batch = p.mask_batch;
  r.mask_time = p.mask_time;
  r.state = {const_cast<void*>(p.state), p.taps.span() * p.channels, p.channels, 1};
  return r;
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

// The epilogue of a task's blocks: pointers to the rows of its tensors, which are converted or not as the task's are.
template <class T, class Src, bool kStaged>
class EpilogueRows {
 public:
  EpilogueRows(const ConvForward& p, const ChannelBlock& block, int64_t max_rows)
      : finish_(p.finish), dilation_(p.taps.dilation) {
    // A window of one tap: the rows that outputs lie at.
    const auto reads = [&](std::optional<InputWindow<T, Src>>& window, const Rows& rows) {
      if (rows.data != nullptr) window.emplace(RowReader<T>{rows}, Taps{1, 0, dilation_}, block, max_rows, 0, kStaged);
    };
    reads(out_gate_, finish_.out_gate);
    reads(residual_, finish_.residual);
    reads(grad_, finish_.grad);
    if (const Rows& out = finish_.grad_out_gate; out.data != nullptr)
      grad_out_gate_.emplace(RowReader<T>{out}, out, Rows{}, nullptr, block, max_rows, kStaged);
  }

  // That of the n rows from `position` on, or nullptr.
  const Epilogue<Src>* open(const Sequence& s, int64_t position, int64_t n) {
    if (!finish_.any()) return nullptr;
    const auto rows = [&](auto& window) {
      return window ? window->template move<kStaged>(s, position, n, false) : nullptr;
    };
    epilogue_ = {finish_.activation, kClose<T>, rows(out_gate_), rows(residual_), rows(grad_), nullptr};
    if (grad_out_gate_) epilogue_.grad_out_gate = grad_out_gate_->template open<kStaged>(s, position, dilation_, n);
    return &epilogue_;
  }
  void flush(const Sequence& s, int64_t position, int64_t n) {
    if constexpr (kStaged)
      if (grad_out_gate_) grad_out_gate_->flush(s, position, dilation_, n);
  }

 private:
  const Finish& finish_;
  const int64_t dilation_;
  std::optional<InputWindow<T, Src>> out_gate_, residual_, grad_;
  std::optional<Sink<T, Src>> grad_out_gate_;
  Epilogue<Src> epilogue_{};
};

// What computes the items of a block of channels.
template <class T, class Blocks>
class ForwardTask {
 public:
  ForwardTask(const ConvForward& p, const RowReader<T>& reader, const ChannelPlan& plan, const ChannelBlock& block,
              const typename Blocks::Filters* shared, bool stream)
      : p_(p),
        aligned_(plan.aligned),
        stream_(stream),
        block_(block),
        shared_(shared),
        first_head_(block.first / (p.channels / p.heads)),
        last_head_(ceil_div(block.last, p.channels / p.heads)),
        max_rows_(shared != nullptr ? Blocks::kBlockRows : kMinRows),
        width_(vector_width<T>(block)),
        filters_(shared != nullptr ? 0 : (last_head_ - first_head_) * p.taps.taps * kPitch),
        expanded_(shared != nullptr || plan.aligned ? 0 : (max_rows_ + kPositionRows) * p.taps.taps * width_),
        bias_(p.bias != nullptr ? width_ : 0),
        window_(reader, p.taps, block, max_rows_, Blocks::rows_behind(shared == nullptr), kStaged),
        sink_(RowReader<T>{p.y, {}}, p.y, {}, nullptr, block, max_rows_, kStaged),
        epilogue_(p, block, max_rows_),
        blocks_(p, plan, block, shared) {
    if (p.bias != nullptr) convert_bias<T>(p, block, bias_.get());
  }

  void run(const Sequence& s, const Item& item) {
    const int64_t d = p_.taps.dilation;
    for (int64_t first = item.first; first < item.last; first += max_rows_) {
      const int64_t n = min(max_rows_, item.last - first), position = item.phase + d * first;
      const bool continues = first > item.first;
      const auto in = window_.template move<kStaged>(s, position, n, continues);
      const auto out = sink_.template open<kStaged>(s, position, d, n);
      compute(s, position, in, out, n, continues, epilogue_.open(s, position, n));
      if constexpr (kStaged) sink_.flush(s, position, d, n);
      epilogue_.flush(s, position, n);
    }
  }

 private:
  using C = Compute<T>;
  using Src = typename Blocks::Src;
  using Elem = typename Src::Elem;
  static constexpr bool kStaged = Blocks::kStaged;
  static constexpr int64_t kPitch = kMinRows;

  void compute(const Sequence& s, int64_t position, const Elem* const* in, Elem* const* out, int64_t n, bool continues,
               const Epilogue<Src>* finish) {
    const C* const bias = p_.bias != nullptr ? bias_.get() : nullptr;
    if (shared_ != nullptr) return blocks_.convolve(in, out, n, continues, bias, stream_, finish);
    const int64_t K = p_.taps.taps;
    make_position_filters<C>({p_, s, position, p_.taps.dilation, n, first_head_, last_head_}, filters_.get(), nullptr,
                             kPitch);
    if (aligned_) {
      blocks_.convolve_positions(in, out, n, continues, {filters_.get(), kPitch, K * kPitch}, bias, stream_, finish);
    } else if constexpr (Blocks::kAnyHeads) {
      const int64_t row = K * width_;
      for (int64_t i = 0; i < n; ++i)
        expand_filters<T>(p_, block_, filters_.get() + i, K * kPitch, kPitch, expanded_.get() + i * row);
      blocks_.convolve_position_channels(in, out, n, {expanded_.get(), row, width_}, bias, stream_, finish);
    }
  }

  const ConvForward& p_;
  const bool aligned_, stream_;
  const ChannelBlock block_;
  const typename Blocks::Filters* const shared_;
  const int64_t first_head_, last_head_, max_rows_, width_;
  // With position-dependent filters: a table of them, and a row for each output, expanded to channels, where heads are
  // unaligned.
  Scratch<C> filters_, expanded_;
  Scratch<C> bias_;
  InputWindow<T, Src> window_;
  Sink<T, Src> sink_;
  EpilogueRows<T, Src, kStaged> epilogue_;
  Blocks blocks_;
};

template <class T, class Blocks>
inline void forward_items(const ConvForward& p, const ChannelPlan& plan, const ChannelBlock& block,
                          const WorkList& work, int64_t begin, int64_t end, const typename Blocks::Filters* shared,
                          bool stream) {
  ForwardTask<T, Blocks> task(p, input_reader<T>(p), plan, block, shared, stream);
  for (int64_t i = begin; i < end; ++i) task.run(work.sequence(work.item(i).sequence), work.item(i));
  if (stream) stream_fence();
}

// run(block, first, last, shared) for all of so many items and blocks of channels, cut into tasks: items [first, last)
// of a block. shared: the filters that all positions share, nullptr if there are none.
template <class Filters, class Run>
inline void run_blocks(const ConvProblem& p, const ChannelPlan& plan, int64_t items, bool per_row, const Run& run) {
  const auto run_all = [&](const Filters* shared) {
    parallel(p, items * plan.blocks, worth_threads(p), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t first = begin % items, last = min(items, first + end - begin);
        run(plan.block(begin / items, p.channels), first, last, shared);
        begin += last - first;
      }
    });
  };
  if (per_row) return run_all(nullptr);
  const Filters shared(p, plan, false, false);
  run_all(&shared);
}

// Whether rows are read and written where they lie.
template <class T>
inline bool rows_in_place(const ConvForward& p) {
  const auto beside = [](const Rows& rows) { return rows.data == nullptr || rows.channel == 1; };
  return kReadInPlace<T> && p.gate.data == nullptr && p.x.channel == 1 && p.y.channel == 1 &&
         beside(p.finish.out_gate) && beside(p.finish.residual) && beside(p.finish.grad) &&
         beside(p.finish.grad_out_gate);
}

// Blocks: what computes rows that are read in place.
template <class T, class Blocks = VectorBlocks<T, false>>
inline const char* conv_forward_typed(const ConvForward& p) {
  if (p.batch * p.time * p.channels == 0) return nullptr;
  const bool per_row = p.per_position || p.renormalize;
  const bool direct = rows_in_place<T>(p), threads = worth_threads(p);
  const int64_t min_channels = channels_per_block(p, direct, ceil_div(p.batch * p.time, kMinRows));
  const ChannelPlan plan = plan_channels<T>(p, direct, per_row, min_channels);
  const int64_t tasks = threads ? max(1, p.threads * 4 / plan.blocks) : 1;
  const int64_t rows = max(kMinRows, min(256, round_up(ceil_div(p.batch * p.time, tasks), kMinRows)));
  const WorkList work(p, rows);
  const bool stream = direct && p.batch * p.time * p.channels * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
                      p.resident_output && can_stream<T>(p.y);
  run_blocks<typename Blocks::Filters>(
      p, plan, work.size(), per_row, [&](const ChannelBlock& block, int64_t first, int64_t last, const auto* shared) {
        if (!block.staged) {
          if constexpr (kReadInPlace<T>) forward_items<T, Blocks>(p, plan, block, work, first, last, shared, stream);
        } else if constexpr (Blocks::kAnyHeads) {
          forward_items<T, typename Blocks::OfConverted>(p, plan, block, work, first, last, shared, false);
        }
      });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
