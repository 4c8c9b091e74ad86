// The tables of attention in the compute type, in the order in which products read them.
#pragma once

#include "csrc/cpu/attention/positions.h"
#include "csrc/cpu/attention/rows.h"

namespace ck::cpu::CK_ISA {

struct Axis {
  int64_t size, stride;
};

// How a table of outer.size rows lies in memory: vector v of row o is at o * row + v * step. Either rows follow each
// other, or the panels of one vector of every row, so that a product with a few columns reads one piece of memory.
template <class C>
struct Layout {
  static constexpr int V = kLanes<C>;

  Axis outer, inner;  // strides: of the tensor
  int64_t row, step;

  static Layout rows(Axis outer, Axis inner) { return {outer, inner, round_up(inner.size, V), V}; }
  static Layout panels(Axis outer, Axis inner) { return {outer, inner, V, outer.size * V}; }

  int64_t size() const { return outer.size * round_up(inner.size, V); }
  int64_t at(int64_t o, int64_t i) const { return o * row + i / V * step + i % V; }
};

// A table in the compute type, of the heads of one group, each as it is first chosen.
template <class C>
class PackedTable {
 public:
  PackedTable(const Attention& p, const HeadTable& t, Layout<C> layout, C factor)
      : table_(t),
        layout_(layout),
        factor_(factor),
        heads_(t.data == nullptr ? 0
               : t.per_head      ? p.sharing()
                                 : 1),
        data_(heads_ * layout.size()),
        packed_(heads_) {
    for (int64_t n = 0; n < heads_; ++n) packed_[n] = -1;
  }

  void choose(int64_t h) {
    if (heads_ == 0) return;
    const int64_t head = table_.per_head ? h : 0, n = head % heads_;
    chosen_ = data_.get() + n * layout_.size();
    if (packed_[n] != head) pack(head * table_.head);
    packed_[n] = head;
  }

  const C* get() const { return chosen_; }  // nullptr: the term is not there
  const C& at(int64_t o, int64_t i) const { return chosen_[layout_.at(o, i)]; }
  // The greatest length of a column; infinity if some element is not finite, 0 without a table.
  C longest_column() const {
    if (heads_ == 0) return 0;
    Vec<C> top = {};
    for (int64_t i = 0; i < layout_.inner.size; i += V) {
      Vec<C> squares = {};
      for (int64_t o = 0; o < layout_.outer.size; ++o) {
        const Vec<C> x = load_bytes<Vec<C>>(&at(o, i));
        squares += x * x;
      }
      top = vmax<C>(top, or_infinity<C>(squares));
    }
    return static_cast<C>(::sqrt(max_lanes<C>(top)));
  }
  // From a column on that begins a vector.
  Vectors<const C> from(int64_t o, int64_t i) const { return {chosen_ + layout_.at(o, i), layout_.row, layout_.step}; }

 private:
  static constexpr int V = kLanes<C>;

  // Rows of the tensor's contiguous axis are read whole, and turned where that is the outer one.
  void pack(int64_t start) {
    const Axis outer = layout_.outer, inner = layout_.inner;
    const bool turn = outer.stride == 1 && inner.stride != 1;
    const Axis along = turn ? outer : inner, across = turn ? inner : outer;
    const int64_t pitch = row_pitch<C>(along.size);
    Scratch<C> rows(V * pitch);
    for (int64_t a = 0; a < across.size; a += V) {
      for (int64_t n = 0; n < V; ++n)
        if (a + n < across.size)
          convert_in(table_.dtype, table_.data, start + (a + n) * across.stride, along.stride, along.size, factor_,
                     rows.get() + n * pitch);
        else
          clear(rows.get() + n * pitch, pitch);
      for (int64_t i = 0; i < along.size; i += V) {
        Vec<C> square[V];
        CK_UNROLL for (int n = 0; n < V; ++n) square[n] = load_bytes<Vec<C>>(rows.get() + n * pitch + i);
        if (turn) transpose<C>(square);
        const int64_t o = turn ? i : a;
        CK_UNROLL for (int n = 0; n < V; ++n) {
          if (o + n >= outer.size) break;
          store_bytes(chosen_ + layout_.at(o + n, turn ? a : i), square[n]);
        }
      }
    }
  }

  HeadTable table_;
  Layout<C> layout_;
  C factor_;
  int64_t heads_;  // copies: one for each head of the group, or one that all share
  Scratch<C> data_;
  Scratch<int64_t> packed_;  // the head that each of heads_ copies holds, -1: none yet
  C* chosen_ = nullptr;
};

}  // namespace ck::cpu::CK_ISA
