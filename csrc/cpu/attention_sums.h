// Gradients of tables: sums over batch rows and positions. Every task adds into a part of its own, and the parts are
// added in a fixed order; how many there are depends on the problem alone. So the results are the same bits on any
// number of threads.
#pragma once

#include "attention_block.h"

namespace ck::cpu::CK_ISA {

// One table's sums.
template <class C>
class TableSums {
 public:
  // rows, pitch: of what each task leaves behind for each of `heads` heads.
  TableSums(bool wanted, const Parts& parts, int64_t heads, int64_t rows, int64_t pitch)
      : wanted_(wanted),
        parts_(parts),
        heads_(heads),
        size_(rows * pitch),
        data_(wanted ? parts.tasks() * heads * size_ : 0) {}

  void open(int64_t task) const {
    if (wanted_) clear(data_.get() + task * heads_ * size_, heads_ * size_);
  }
  // nullptr: not wanted.
  C* of(int64_t task, int64_t head) const { return wanted_ ? data_.get() + (task * heads_ + head) * size_ : nullptr; }

  // Writes the gradient of `t`, [heads][rows.size][columns.size] contiguous; the axes say where its elements lie in a
  // part.
  void finish(const Attention& p, const HeadTable& t, void* out, Axis rows, Axis columns, C factor) const {
    if (!wanted_) return;
    const int64_t units = p.heads / heads_;  // of one batch row
    const auto sums_of = [&](int64_t h, int64_t b, int64_t part) {
      return of((b * units + h / heads_) * parts_.parts + part, h % heads_);
    };
    for (int64_t h = 0; h < p.heads && p.batch > 0; ++h)
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t part = b == 0; part < parts_.parts; ++part) add_to(sums_of(h, 0, 0), sums_of(h, b, part), size_);
    with_dtype(t.dtype, [&](auto* tag) {
      using T = __typeof__(*tag);
      if constexpr (std::is_same_v<Compute<T>, C>) {
        T* to = static_cast<T*>(out);
        for (int64_t h = 0; h < (t.per_head ? p.heads : 1); ++h)
          for (int64_t r = 0; r < rows.size; ++r)
            for (int64_t c = 0; c < columns.size; ++c, ++to) {
              const int64_t element = r * rows.stride + c * columns.stride;
              C sum = 0;
              for (int64_t head = h; head < (t.per_head ? h + 1 : p.heads); ++head)
                sum += p.batch > 0 ? sums_of(head, 0, 0)[element] : C{0};
              from_float(sum * factor, *to);
            }
      }
    });
  }

 private:
  bool wanted_;
  Parts parts_;
  int64_t heads_, size_;
  Scratch<C> data_;
};

}  // namespace ck::cpu::CK_ISA
