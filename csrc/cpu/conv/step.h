// tap_step: a forward pass over the next positions of every sequence, which then updates the sequence's state.
#pragma once

#include "csrc/cpu/conv/forward.h"

namespace ck::cpu::CK_ISA {

// A sequence that continues from a state.
inline Sequence step_sequence(const ConvStep& p, int64_t number) {
  const States& states = p.states;
  Sequence s{number, 0, p.time, 0, 0, 0};
  if (p.offsets != nullptr) s = {0, p.offsets[number], p.offsets[number + 1], 0, 0, 0};
  s.state = states.source.get(number, states.slot.get(number, number));
  s.before = states.old_row(number, s.length(), 0);
  s.history = min(p.taps.span(), states.position.get(number, p.taps.span()));
  return s;
}

// Copies n numbers that lie some way apart; both may be the same memory.
template <class T>
inline void copy_strided(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    memmove(static_cast<void*>(to), from, static_cast<size_t>(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// A state whose channels follow each other, each with all its positions.
inline bool lies_by_channels(const Rows& state, int64_t width) {
  return channels_first(state) && state.channel == width;
}

// The old states of a block, whose rows are gathered where channels do not lie next to each other.
template <class T>
class OldStates {
 public:
  OldStates(const ConvStep& p, const ChannelBlock& block)
      : p_(p), block_(block), pitch_(p.old.channel == 1 ? 0 : row_pitch<T>(block)), rows_(p.states.width * pitch_) {}

  // Where rows of a sequence that was read lie.
  Rows rows() const { return pitch_ == 0 ? p_.old : Rows{rows_.get() - block_.first, 0, pitch_, 1}; }

  // From row `first` on.
  void read(const Sequence& s, int64_t first) {
    if (pitch_ == 0 || first >= s.before) return;
    const Rows& old = p_.old;
    const T* const from = static_cast<const T*>(old.data) + s.state * old.batch + block_.first * old.channel;
    if (channels_first(old))
      return gather(from, old.channel, p_.states.width, first, s.before, block_.size(), rows_.get(), pitch_);
    for (int64_t w = first; w < s.before; ++w)
      copy_strided(from + w * old.time, old.channel, rows_.get() + w * pitch_, 1, block_.size());
  }

 private:
  const ConvStep& p_;
  const ChannelBlock block_;
  const int64_t pitch_;
  Scratch<T> rows_;
};

// Leaves the channels of a block of a sequence's state in a slot as they are after some of its positions.
template <class T>
class StateUpdate {
 public:
  StateUpdate(const ConvStep& p, const RowReader<T>& reader, const ChannelBlock& block)
      : p_(p),
        reader_(reader),
        block_(block),
        row_(p.gate.data != nullptr ? vector_width<T>(block) : 0),
        by_channels_(lies_by_channels(p.old, p.states.width) && lies_by_channels(p.states.pool, p.states.width)),
        pitch_(channels_first(p.states.pool) ? row_pitch<T>(block) : 0),
        turned_(p.states.width * pitch_) {}

  // The first row of the old state that `run` wants to be read.
  int64_t first_row(const Sequence& s) const {
    const int64_t least = p_.states.saves > 0 ? min(1, s.length()) : s.length();
    return by_channels_ && moved_by(s, least) >= 0 ? s.before : 0;
  }

  // The states on the way first, because they are made of the old state.
  void run(const Sequence& s, int64_t slot) {
    for (int64_t m = 0; m < p_.states.saves; ++m) {
      const int64_t at = p_.states.save_at[m], into = p_.states.save_slot[m];
      if (into >= 0 && at > s.begin && at <= s.end) leave(s, at - s.begin, into);
    }
    leave(s, s.length(), slot);
  }

 private:
  // Row w + moved_by of the old state becomes row w of that after n positions.
  int64_t moved_by(const Sequence& s, int64_t n) const { return s.before - p_.states.row(n, 0); }

  // The state after n positions.
  void leave(const Sequence& s, int64_t n, int64_t slot) {
    const Rows& pool = p_.states.pool;
    const int64_t width = p_.states.width, kept = max(0, p_.states.row(n, 0)), by = s.before - kept;
    T* const to = static_cast<T*>(pool.data) + slot * pool.batch + block_.first * pool.channel;
    if (pitch_ == 0) {
      move(s, to, pool.time, pool.channel, kept, by);
      return append(s, n, to, pool.time, pool.channel);
    }
    append(s, n, turned_.get(), pitch_, 1);
    if (by_channels_ && by >= 0) {
      // What comes from the next channel is overwritten.
      const T* const from = static_cast<const T*>(p_.old.data) + s.state * p_.old.batch + block_.first * width;
      if (kept > 0) copy_strided(from + by, 1, to, 1, block_.size() * width - by);
      return scatter(turned_.get(), pitch_, width, kept, block_.size(), to, width);
    }
    move(s, turned_.get(), pitch_, 1, kept, by);
    scatter(turned_.get(), pitch_, width, 0, block_.size(), to, pool.channel);
  }

  // Row w + by of the old state becomes row w < kept.
  void move(const Sequence& s, T* to, int64_t time, int64_t channel, int64_t kept, int64_t by) const {
    const Rows& old = reader_.state;
    const T* const from = static_cast<const T*>(old.data) + s.state * old.batch + block_.first;
    if (kept > 0 && by >= 0 && channel == 1 && time == block_.size() && old.time == time)
      return copy_strided(from + by * time, 1, to, 1, kept * time);  // rows follow each other
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t row = by >= 0 ? i : kept - 1 - i, source = row + by;  // none that is still to be read is written
      T* const into = to + row * time;
      if (source >= 0) {
        copy_strided(from + source * old.time, 1, into, channel, block_.size());
      } else {
        for (int64_t c = 0; c < block_.size(); ++c) into[c * channel] = T{};
      }
    }
  }

  // z at the last of n positions, to their rows.
  void append(const Sequence& s, int64_t n, T* rows, int64_t time, int64_t channel) {
    for (int64_t t = max(0, n - p_.states.width); t < n; ++t) {
      T* const to = rows + p_.states.row(n, t) * time;
      if (p_.gate.data == nullptr) {
        const T* const x = reader_.row(reader_.rows, s, t) + block_.first * reader_.rows.channel;
        copy_strided(x, reader_.rows.channel, to, channel, block_.size());
        continue;
      }
      reader_.convert(s, t, block_, row_.get());
      constexpr int P = Lanes<T>::kParts, V = kLanes<Compute<T>>, U = Lanes<T>::kUnit;
      for (int64_t u = 0, left = block_.size(); left > 0; ++u, left -= U) {
        Vec<Compute<T>> v[P];
        for (int part = 0; part < P; ++part) v[part] = load_bytes<Vec<Compute<T>>>(row_.get() + (u * P + part) * V);
        store_unit(to + u * U * channel, channel, left, v);
      }
    }
  }

  const ConvStep& p_;
  const RowReader<T>& reader_;
  const ChannelBlock block_;
  Scratch<Compute<T>> row_;  // the gated row
  const bool by_channels_;
  const int64_t pitch_;
  Scratch<T> turned_;  // rows of a new state, where positions lie next to each other
};

template <class T>
inline void clear(T* row, int64_t stride, const ChannelBlock& block) {
  for (int64_t c = block.first; c < block.last; ++c) row[c * stride] = T{};
}

template <class T, class Blocks>
inline void step_rows(const ConvStep& p, const ChannelPlan& plan, const ChannelBlock& block, int64_t begin, int64_t end,
                      const typename Blocks::Filters* shared) {
  OldStates<T> old(p, block);
  RowReader<T> reader = input_reader<T>(p);
  reader.state = old.rows();
  ForwardTask<T, Blocks> forward(p, reader, plan, block, shared, false);
  StateUpdate<T> update(p, reader, block);
  for (int64_t number = begin; number < end; ++number) {
    const Sequence s = step_sequence(p, number);
    const int64_t slot = p.states.slot.get(number, number), length = s.length();
    if (slot < 0) {
      for (int64_t t = 0; t < length; ++t) clear(const_cast<T*>(reader.row(p.y, s, t)), p.y.channel, block);
      continue;
    }
    old.read(s, min(max(0, s.before - s.history), update.first_row(s)));
    for (int64_t phase = 0; phase < min(p.taps.dilation, length); ++phase)
      forward.run(s, {0, phase, 0, phase_length(length, p.taps.dilation, phase)});
    update.run(s, slot);
  }
}

// One position of every sequence with few taps of every channel, in one pass: what is read of a state is in registers
// when it is written.
template <class T>
inline bool together(const ConvStep& p) {
  const States& states = p.states;
  const auto beside = [&](const Rows& rows) { return rows.channel == 1; };
  const auto turned = [&](const Rows& rows) { return lies_by_channels(rows, states.width) && exchanged(states.width); };
  const int64_t K = p.taps.taps;
  return p.time == 1 && p.offsets == nullptr && p.mask == nullptr && rows_in_place<T>(p) && p.heads == p.channels &&
         !p.per_position && !p.renormalize && p.taps.dilation == 1 && K >= 2 && K <= 4 &&
         (states.width == K - 1 || states.width == K) && states.saves == 0 && states.accepted.data == nullptr &&
         states.position.data == nullptr &&
         ((beside(p.old) && beside(states.pool)) || (turned(p.old) && turned(states.pool)));
}

template <class T, int kTaps, int kWidth, bool kTurned, Activation kActivation, bool kToTheLast>
inline void step_units(const Rows& old, const Rows& pool, const T* x, T* y, const ChannelTaps<Compute<T>>& filter,
                       const Compute<T>* bias, const Epilogue<Lanes<T>>& epilogue, int64_t units) {
  using C = Compute<T>;
  constexpr int P = Lanes<T>::kParts, U = Lanes<T>::kUnit, kAhead = 8;
  constexpr int kUnitRows = kTurned ? kWidth : 1;  // rows of a unit that follow each other
  // Copies, because what is stored might change what references refer to.
  const T* from = static_cast<const T*>(old.data);
  T* to = static_cast<T*>(pool.data);
  const int64_t from_row = kTurned ? U : old.time, to_row = pool.time;
  const ChannelTaps<C> taps = filter;
  const Epilogue<Lanes<T>> finish = epilogue;
  for (int64_t unit = 0; unit < units; ++unit) {
    // There are more rows than the hardware's prefetch follows.
    CK_UNROLL for (int w = 0; w < kWidth; ++w) __builtin_prefetch(from + w * from_row + kAhead * U * kUnitRows, 1, 3);
    __builtin_prefetch(x + kAhead * U, 0, 3);
    CloseUnit<T, kWidth> memory;
    Raw<T> row[kWidth + 1];
    if constexpr (kTurned) {
      memory.load(from);
      each<kWidth>([&](auto w) CK_INLINE_LAMBDA { row[w.value] = memory.template row<w.value>(); });
    } else {
      CK_UNROLL for (int w = 0; w < kWidth; ++w) row[w] = load_bytes<Raw<T>>(from + w * from_row);
    }
    row[kWidth] = load_bytes<Raw<T>>(x);
    Vec<C> sum[P] = {};
    if (bias != nullptr) {
      CK_UNROLL for (int p = 0; p < P; ++p) sum[p] = load_bytes<Vec<C>>(bias + (unit * P + p) * kLanes<C>);
    }
    CK_UNROLL for (int k = 0; k < kTaps; ++k) {
      const Raw<T> z = row[kWidth + 1 - kTaps + k];
      sum[0] += taps.template value<P, 0>(0, k, unit) * widen<T, 0>(z);
      if constexpr (P == 2) sum[1] += taps.template value<P, 1>(0, k, unit) * widen<T, 1>(z);
    }
    finish.template store_unit<kActivation, kToTheLast>(sum, 0, unit, y, false);
    if constexpr (kTurned) {
      memory.shift();
      memory.template place<kWidth - 1>(row[kWidth]);
      memory.store(to);
    } else {
      CK_UNROLL for (int w = 0; w < kWidth; ++w) store_bytes(to + w * to_row, row[w + 1]);
    }
    from += U * kUnitRows;
    to += U * kUnitRows;
    x += U;
  }
}

template <class T, int kTaps, int kWidth, bool kTurned>
inline void step_together(const ConvStep& p, const ChannelBlock& block, int64_t begin, int64_t end,
                          const SharedFilters<T>& filters) {
  using C = Compute<T>;
  Scratch<C> bias(p.bias != nullptr ? vector_width<T>(block) : 0);
  if (p.bias != nullptr) convert_bias<T>(p, block, bias.get());
  EpilogueRows<T, Lanes<T>, false> epilogue(p, block, 1);
  const auto at = [&](const Rows& rows, int64_t number) {
    T* const data = static_cast<T*>(rows.data) + number * rows.batch + block.first * rows.channel;
    return Rows{data, 0, rows.time, rows.channel};
  };
  for (int64_t number = begin; number < end; ++number) {
    const Sequence s = step_sequence(p, number);
    const int64_t slot = p.states.slot.get(number, number);
    T* const y = static_cast<T*>(p.y.data) + number * p.y.batch;
    if (slot < 0) {
      clear(y, 1, block);
      continue;
    }
    const T* const x = static_cast<const T*>(p.x.data) + number * p.x.batch + block.first;
    const Epilogue<Lanes<T>>* const finish = epilogue.open(s, 0, 1);
    const Epilogue<Lanes<T>> as_it_is{};
    (finish != nullptr ? *finish : as_it_is).with_kind([&](auto activation, auto to_the_last) {
      step_units<T, kTaps, kWidth, kTurned, activation.value, to_the_last.value>(
          at(p.old, s.state), at(p.states.pool, slot), x, y + block.first, filters.of_channels(p, block),
          p.bias != nullptr ? bias.get() : nullptr, finish != nullptr ? *finish : as_it_is, units_of<T>(block));
    });
  }
}

template <class T>
inline void step_together(const ConvStep& p, const ChannelBlock& block, int64_t begin, int64_t end,
                          const SharedFilters<T>& filters) {
  const auto run = [&](auto taps, auto width) {
    constexpr int kTaps = taps.value, kWidth = width.value;
    if (p.old.channel == 1) return step_together<T, kTaps, kWidth, false>(p, block, begin, end, filters);
    if constexpr (kWidth > 1) step_together<T, kTaps, kWidth, true>(p, block, begin, end, filters);
  };
  const auto of_taps = [&](auto taps) {
    constexpr int K = taps.value;
    p.states.width == K ? run(taps, taps) : run(taps, std::integral_constant<int, K - 1>());
  };
  switch (p.taps.taps) {
    case 2: return of_taps(std::integral_constant<int, 2>());
    case 3: return of_taps(std::integral_constant<int, 3>());
    case 4: return of_taps(std::integral_constant<int, 4>());
  }
}

template <class T>
inline const char* conv_step_typed(const ConvStep& p) {
  using Blocks = VectorBlocks<T, false>;
  const int64_t sequences = p.states.sequences;
  if (sequences * p.channels == 0) return nullptr;
  const bool per_row = p.per_position || p.renormalize;
  const bool direct = rows_in_place<T>(p);
  // As many channels as stay in the caches: rows are read for the outputs and then for the state.
  const int64_t rows = min(p.time, Blocks::kBlockRows) + p.taps.taps + (direct ? 3 : 0) +
                       (p.old.channel == 1 ? 0 : p.states.width) + (p.states.pool.channel == 1 ? 0 : p.states.width);
  const int64_t near = (direct ? 1 << 15 : 1 << 14) / rows;
  const bool whole = together<T>(p);
  const int64_t most = channels_per_block(p, true, sequences), channels = whole ? most : min(max(near, 256), most);
  const ChannelPlan plan = plan_channels<T>(p, direct, per_row, channels);
  run_blocks<typename Blocks::Filters>(
      p, plan, sequences, per_row, [&](const ChannelBlock& block, int64_t first, int64_t last, const auto* shared) {
        if (block.staged) {
          step_rows<T, typename Blocks::OfConverted>(p, plan, block, first, last, shared);
        } else if constexpr (kReadInPlace<T>) {
          if (whole) return step_together<T>(p, block, first, last, *shared);
          step_rows<T, Blocks>(p, plan, block, first, last, shared);
        }
      });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
