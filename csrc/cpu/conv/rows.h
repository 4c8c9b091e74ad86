// Rows in and rows out: where windows find their inputs, and where results go, for any strides.
#pragma once

#include "csrc/cpu/conv/epilogue.h"
#include "csrc/cpu/conv/filters.h"
#include "csrc/cpu/conv/transposed.h"

namespace ck::cpu::CK_ISA {

// A tensor of rows with what the prologue does to it.
template <class T>
struct RowReader {
  Rows rows, gate{};
  Activation gate_activation = Activation::kSigmoid;
  const bool* mask = nullptr;
  int64_t mask_batch = 0, mask_time = 0;
  Rows state{};  // batch: from state to state; its channels lie next to each other

  CK_INLINE bool masked(const Sequence& s, int64_t position) const {
    return mask != nullptr && !mask[s.batch * mask_batch + (s.begin + position) * mask_time];
  }
  CK_INLINE const T* row(const Rows& r, const Sequence& s, int64_t position) const {
    return static_cast<const T*>(r.data) + s.batch * r.batch + (s.begin + position) * r.time;
  }
  CK_INLINE bool in_state(const Sequence& s, int64_t position) const {
    return state.data != nullptr && position < 0 && position >= -s.history;
  }
  CK_INLINE const T* state_row(const Sequence& s, int64_t position) const {
    return static_cast<const T*>(state.data) + s.state * state.batch + (s.before + position) * state.time;
  }

  // The row to read in place at `position`, or nullptr where it reads as 0.
  CK_INLINE const T* find(const Sequence& s, int64_t position) const {
    if (position < 0) return in_state(s, position) ? state_row(s, position) : nullptr;
    if (position >= s.length() || masked(s, position)) return nullptr;
    return row(rows, s, position);
  }

  // Converts the channels of `block` at `position`, gated.
  inline void convert(const Sequence& s, int64_t position, const ChannelBlock& block, Compute<T>* out) const {
    constexpr int P = Lanes<T>::kParts, V = kLanes<Compute<T>>;
    const T* x = find(s, position);
    if (x == nullptr) {
      memset(static_cast<void*>(out), 0, static_cast<size_t>(vector_width<T>(block)) * sizeof(*out));
      return;
    }
    const int64_t stride = position < 0 ? 1 : rows.channel;
    const T* g = gate.data != nullptr && position >= 0 ? row(gate, s, position) + block.first * gate.channel : nullptr;
    x += block.first * stride;
    for (int64_t u = 0, n = block.size(); n > 0; ++u, n -= Lanes<T>::kUnit) {
      Vec<Compute<T>> v[P], w[P];
      load_unit(x + u * Lanes<T>::kUnit * stride, stride, n, v);
      if (g != nullptr) load_unit(g + u * Lanes<T>::kUnit * gate.channel, gate.channel, n, w);
      CK_UNROLL for (int part = 0; part < P; ++part) store_bytes(
          out + (u * P + part) * V, g != nullptr ? v[part] * activate<T>(gate_activation, w[part]).value : v[part]);
    }
  }
};

// Pointers to the input rows that a block of outputs reads: row q is read by output i with tap q - i. Src is Lanes<T>
// (rows are read where they lie) or Staged<T> (rows are converted into a buffer that moves along with the block).
template <class T, class Src>
class InputWindow {
 public:
  using Elem = typename Src::Elem;

  InputWindow(const RowReader<T>& reader, const Taps& taps, const ChannelBlock& block, int64_t max_rows, int64_t margin,
              bool staged)
      : reader_(reader),
        taps_(taps),
        block_(block),
        halo_(taps.taps - 1),
        margin_(margin),
        width_(vector_width<T>(block)),
        pointers_(max_rows + taps.taps - 1 + margin),
        buffer_(staged ? (max_rows + taps.taps - 1) * width_ : 0),
        zero_(staged ? width_ : round_up(block.size(), Lanes<T>::kUnit)) {
    memset(static_cast<void*>(zero_.get()), 0,
           static_cast<size_t>(staged ? width_ : round_up(block.size(), Lanes<T>::kUnit)) * sizeof(Elem));
  }

  // Rows for n outputs at positions first, first + dilation, ... `continues`: the block follows the previous one.
  template <bool kStaged>
  const Elem* const* move(const Sequence& s, int64_t first, int64_t n, bool continues) {
    const int64_t count = n + halo_, origin = taps_.source(first, 0);
    const Elem** const to = pointers_.get();
    if constexpr (kStaged) {
      int64_t q = 0;
      if (continues) {
        memmove(static_cast<void*>(buffer_.get()), buffer_.get() + previous_ * width_,
                static_cast<size_t>(halo_ * width_) * sizeof(Elem));
        q = halo_;
      }
      convert_rows(s, origin, q, count);
      previous_ = n;
      for (q = 0; q < count; ++q) to[q] = buffer_.get() + q * width_;
      for (; q < count + margin_; ++q) to[q] = zero_.get();
    } else {
      for (int64_t q = 0; q < count + margin_; ++q) {
        const T* row = reader_.find(s, origin + taps_.dilation * q);
        to[q] = row != nullptr ? row + block_.first : zero_.get();
      }
    }
    return to;
  }

  // The row of the window that lies at the position of output 0, if there is one.
  int64_t center() const { return taps_.left / taps_.dilation; }

 private:
  // Rows [q, count) of the window that starts at position `origin`.
  void convert_rows(const Sequence& s, int64_t origin, int64_t q, int64_t count) {
    const bool turn = channels_first(reader_.rows) && reader_.gate.data == nullptr && taps_.dilation == 1;
    while (q < count) {
      const int64_t position = origin + taps_.dilation * q;
      Elem* const to = buffer_.get() + q * width_;
      const int64_t run = turn && position >= 0 ? min(s.length() - position, count - q) : 0;
      if (run <= 1) {
        reader_.convert(s, position, block_, to);
        ++q;
        continue;
      }
      const int64_t stride = reader_.rows.channel;
      load_transposed(reader_.row(reader_.rows, s, position) + block_.first * stride, stride, run, block_, to);
      for (int64_t i = 0; i < run; ++i)
        if (reader_.masked(s, position + i))
          memset(static_cast<void*>(to + i * width_), 0, static_cast<size_t>(width_) * sizeof(Elem));
      q += run;
    }
  }

  RowReader<T> reader_;
  Taps taps_;
  ChannelBlock block_;
  int64_t halo_, margin_, width_, previous_ = 0;
  Scratch<const Elem*> pointers_;
  Scratch<Elem> buffer_, zero_;
};

// Where the rows of a result go. In place: Dst = Lanes<T>. Otherwise they are computed into a buffer and leave it
// through `flush`, which also applies the derivative of the gate.
template <class T, class Dst>
class Sink {
 public:
  using Elem = typename Dst::Elem;
  using C = Compute<T>;

  // `out` receives the result; with a gate, d(gate) goes to `out_gate`. Either may be absent.
  Sink(const RowReader<T>& reader, const Rows& out, const Rows& out_gate, void* out_state, const ChannelBlock& block,
       int64_t max_rows, bool staged)
      : reader_(reader),
        out_(out),
        out_gate_(out_gate),
        out_state_(static_cast<T*>(out_state)),
        block_(block),
        width_(vector_width<T>(block)),
        pointers_(max_rows),
        buffer_(staged ? max_rows * width_ : round_up(block.size(), Lanes<T>::kUnit)) {}

  template <bool kStaged>
  Elem* const* open(const Sequence& s, int64_t first, int64_t step, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (kStaged) {
        pointers_[i] = buffer_.get() + i * width_;
      } else {
        const int64_t position = first + i * step;
        T* const row = target(s, position);
        if (position >= 0 && reader_.masked(s, position)) {
          memset(static_cast<void*>(row), 0, static_cast<size_t>(block_.size()) * sizeof(T));
          pointers_[i] = buffer_.get();  // the value is not wanted
        } else {
          pointers_[i] = row;
        }
      }
    }
    return pointers_.get();
  }

  void flush(const Sequence& s, int64_t first, int64_t step, int64_t n) {
    if (out_.data != nullptr && channels_first(out_) && reader_.gate.data == nullptr && step == 1 && first >= 0) {
      for (int64_t i = 0; i < n; ++i)
        if (reader_.masked(s, first + i))
          memset(static_cast<void*>(buffer_.get() + i * width_), 0, static_cast<size_t>(width_) * sizeof(Elem));
      store_transposed<T>(reinterpret_cast<const C*>(buffer_.get()), n, block_, target(s, first), out_.channel);
      return;
    }
    for (int64_t i = 0; i < n; ++i) write(s, first + i * step, reinterpret_cast<const C*>(buffer_.get() + i * width_));
  }

 private:
  CK_INLINE T* target(const Sequence& s, int64_t position) const {
    if (position < 0)
      return out_state_ + s.state * reader_.state.batch + (s.before + position) * reader_.state.time + block_.first;
    return const_cast<T*>(reader_.row(out_, s, position)) + block_.first * out_.channel;
  }

  inline void write(const Sequence& s, int64_t position, const C* row) const {
    constexpr int P = Lanes<T>::kParts, V = kLanes<C>, U = Lanes<T>::kUnit;
    const bool inside = position >= 0, zero = inside && reader_.masked(s, position);
    const bool gated = inside && reader_.gate.data != nullptr;
    T* const to = out_.data != nullptr || !inside ? target(s, position) : nullptr;
    const int64_t stride = inside ? out_.channel : 1;
    T* const to_gate = gated && out_gate_.data != nullptr
                           ? const_cast<T*>(reader_.row(out_gate_, s, position)) + block_.first * out_gate_.channel
                           : nullptr;
    const T* const x = gated ? reader_.row(reader_.rows, s, position) + block_.first * reader_.rows.channel : nullptr;
    const T* const g = gated ? reader_.row(reader_.gate, s, position) + block_.first * reader_.gate.channel : nullptr;
    for (int64_t u = 0, n = block_.size(); n > 0; ++u, n -= U) {
      Vec<C> dz[P], dgate[P];
      CK_UNROLL for (int part = 0; part < P; ++part) {
        dz[part] = zero ? Vec<C>{} : load_bytes<Vec<C>>(row + (u * P + part) * V);
        dgate[part] = Vec<C>{};
      }
      if (gated && !zero) {
        Vec<C> xv[P], gv[P];
        load_unit(x + u * U * reader_.rows.channel, reader_.rows.channel, n, xv);
        load_unit(g + u * U * reader_.gate.channel, reader_.gate.channel, n, gv);
        CK_UNROLL for (int part = 0; part < P; ++part) {
          const Activated<C> open = activate<T>(reader_.gate_activation, gv[part]);
          dgate[part] = dz[part] * xv[part] * open.slope;
          dz[part] *= open.value;
        }
      }
      if (to != nullptr) store_unit(to + u * U * stride, stride, n, dz);
      if (to_gate != nullptr) store_unit(to_gate + u * U * out_gate_.channel, out_gate_.channel, n, dgate);
    }
  }

  RowReader<T> reader_;
  Rows out_, out_gate_;
  T* out_state_;
  ChannelBlock block_;
  int64_t width_;
  Scratch<Elem*> pointers_;
  Scratch<Elem> buffer_;
};

// Outputs [first, last) of one phase of a sequence: positions phase + dilation * i. With dilation d a sequence falls
// into d interleaved phases, each of which is an ordinary convolution.
struct Item {
  int64_t sequence, phase, first, last;
};

inline int64_t phase_length(int64_t length, int64_t dilation, int64_t phase) {
  return phase < length ? ceil_div(length - phase, dilation) : 0;
}

class WorkList {
 public:
  WorkList(const ConvProblem& p, int64_t rows_per_item)
      : sequences_(p.batch * p.sequences), items_(count_items(p, rows_per_item)) {
    int64_t n = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < p.sequences; ++i) {
        const int64_t index = b * p.sequences + i;
        Sequence& s = sequences_[index];
        s.batch = b;
        s.begin = p.offsets != nullptr ? p.offsets[i] : 0;
        s.end = p.offsets != nullptr ? p.offsets[i + 1] : p.time;
        s.state = index;
        s.before = p.taps.span();
        s.history = p.state == nullptr ? 0 : s.before;
        const int64_t phases = min(p.taps.dilation, s.length());
        for (int64_t phase = 0; phase < phases; ++phase) {
          const int64_t length = phase_length(s.length(), p.taps.dilation, phase);
          for (int64_t first = 0; first < length; first += rows_per_item)
            items_[n++] = {index, phase, first, min(first + rows_per_item, length)};
        }
      }
    }
    size_ = n;
  }

  int64_t size() const { return size_; }
  const Item& item(int64_t i) const { return items_[i]; }
  const Sequence& sequence(int64_t i) const { return sequences_[i]; }

 private:
  static int64_t count_items(const ConvProblem& p, int64_t rows_per_item) {
    int64_t n = 0;
    for (int64_t i = 0; i < p.sequences; ++i) {
      const int64_t length = p.offsets != nullptr ? p.offsets[i + 1] - p.offsets[i] : p.time;
      const int64_t phases = min(p.taps.dilation, length);
      for (int64_t phase = 0; phase < phases; ++phase)
        n += ceil_div(phase_length(length, p.taps.dilation, phase), rows_per_item);
    }
    return n * p.batch;
  }

  Scratch<Sequence> sequences_;
  Scratch<Item> items_;
  int64_t size_ = 0;
};

}  // namespace ck::cpu::CK_ISA
