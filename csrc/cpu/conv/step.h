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

// Leaves the channels of a block of a sequence's state in a slot as they are after some of its positions.
template <class T>
class StateUpdate {
 public:
  StateUpdate(const ConvStep& p, const RowReader<T>& reader, const ChannelBlock& block)
      : p_(p), reader_(reader), block_(block), row_(p.gate.data != nullptr ? vector_width<T>(block) : 0) {}

  // The states on the way first, because they are made of the old state.
  void run(const Sequence& s, int64_t slot) {
    for (int64_t m = 0; m < p_.states.saves; ++m) {
      const int64_t at = p_.states.save_at[m], into = p_.states.save_slot[m];
      if (into >= 0 && at > s.begin && at <= s.end) leave(s, at - s.begin, into);
    }
    leave(s, s.length(), slot);
  }

 private:
  // The state after n positions.
  void leave(const Sequence& s, int64_t n, int64_t slot) {
    const States& states = p_.states;
    T* const to = static_cast<T*>(states.pool.data) + slot * states.pool.batch + block_.first * states.pool.channel;
    const int64_t kept = max(0, states.row(n, 0));
    if (kept > 0) move_up(s, to, kept, s.before - kept);
    for (int64_t t = max(0, n - states.width); t < n; ++t) append(s, t, to + states.row(n, t) * states.pool.time);
  }

  // Row w + by of the old state becomes row w < kept.
  void move_up(const Sequence& s, T* to, int64_t kept, int64_t by) const {
    const Rows &pool = p_.states.pool, &old = p_.old;
    const T* const from = static_cast<const T*>(old.data) + s.state * old.batch + block_.first * old.channel;
    const int64_t width = p_.states.width;
    if (by >= 0 && pool.time == 1 && pool.channel == width && old.time == 1 && old.channel == width) {
      // Rows of a channel follow those of the one before it: what comes from the next one is overwritten by x.
      return copy_strided(from + by, 1, to, 1, block_.size() * width - by);
    }
    if (by >= 0 && pool.channel == 1 && old.channel == 1 && pool.time == block_.size() && old.time == block_.size()) {
      return copy_strided(from + by * old.time, 1, to, 1, kept * block_.size());  // rows follow each other
    }
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t row = by >= 0 ? i : kept - 1 - i, source = row + by;  // none that is still to be read is written
      T* const into = to + row * pool.time;
      if (source >= 0) {
        copy_strided(from + source * old.time, old.channel, into, pool.channel, block_.size());
      } else {
        for (int64_t c = 0; c < block_.size(); ++c) into[c * pool.channel] = T{};
      }
    }
  }

  // z at position t.
  void append(const Sequence& s, int64_t t, T* to) {
    const int64_t stride = p_.states.pool.channel;
    if (p_.gate.data == nullptr) {
      const T* const x = reader_.row(reader_.rows, s, t) + block_.first * reader_.rows.channel;
      return copy_strided(x, reader_.rows.channel, to, stride, block_.size());
    }
    reader_.convert(s, t, block_, row_.get());
    constexpr int P = Lanes<T>::kParts, V = kLanes<Compute<T>>, U = Lanes<T>::kUnit;
    for (int64_t u = 0, n = block_.size(); n > 0; ++u, n -= U) {
      Vec<Compute<T>> v[P];
      for (int part = 0; part < P; ++part) v[part] = load_bytes<Vec<Compute<T>>>(row_.get() + (u * P + part) * V);
      store_unit(to + u * U * stride, stride, n, v);
    }
  }

  const ConvStep& p_;
  const RowReader<T>& reader_;
  const ChannelBlock block_;
  Scratch<Compute<T>> row_;
};

template <class T, class Blocks>
inline void step_rows(const ConvStep& p, const RowReader<T>& reader, const ChannelPlan& plan, const ChannelBlock& block,
                      int64_t begin, int64_t end, const typename Blocks::Filters* shared) {
  ForwardTask<T, Blocks> forward(p, reader, plan, block, shared, false);
  StateUpdate<T> update(p, reader, block);
  for (int64_t number = begin; number < end; ++number) {
    const Sequence s = step_sequence(p, number);
    const int64_t slot = p.states.slot.get(number, number), length = s.length();
    if (slot < 0) {
      for (int64_t t = 0; t < length; ++t) {
        T* const y = const_cast<T*>(reader.row(p.y, s, t));
        for (int64_t c = block.first; c < block.last; ++c) y[c * p.y.channel] = T{};
      }
      continue;
    }
    for (int64_t phase = 0; phase < min(p.taps.dilation, length); ++phase)
      forward.run(s, {0, phase, 0, phase_length(length, p.taps.dilation, phase)});
    update.run(s, slot);
  }
}

template <class T>
inline const char* conv_step_typed(const ConvStep& p) {
  using Blocks = VectorBlocks<T, false>;
  const int64_t sequences = p.states.sequences;
  if (sequences * p.channels == 0) return nullptr;
  RowReader<T> reader = input_reader<T>(p);
  reader.state = p.old;
  const bool per_row = p.per_position || p.renormalize;
  const bool direct = rows_in_place<T>(p) && p.old.channel == 1;
  // As many channels as stay in the caches: rows are read for the outputs and then for the state.
  const int64_t near =
      (direct ? 1 << 15 : 1 << 14) / (min(p.time, Blocks::kBlockRows) + p.taps.taps + (direct ? 3 : 0));
  const int64_t channels = min(max(near, 256), channels_per_block(p, true, sequences));
  const ChannelPlan plan = plan_channels<T>(p, direct, per_row, channels);
  run_blocks<typename Blocks::Filters>(
      p, plan, sequences, per_row, [&](const ChannelBlock& block, int64_t first, int64_t last, const auto* shared) {
        if (block.staged) {
          step_rows<T, typename Blocks::OfConverted>(p, reader, plan, block, first, last, shared);
        } else if constexpr (kReadInPlace<T>) {
          step_rows<T, Blocks>(p, reader, plan, block, first, last, shared);
        }
      });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
