// Sums that several tasks add to: the gradients of keys and values, and of tables, which are sums over batch rows and
// positions. Every task accumulates a partial sum of its own, and partial sums are added in the order of the tasks. The
// number of tasks depends on the problem alone, so that results are the same bits on any number of threads.
#pragma once

#include "csrc/cpu/attention/block.h"

namespace ck::cpu::CK_ISA {

// Sums of `size` elements, each over `tasks_per_sum` consecutive tasks. The thread that runs the first task of a sum
// adds its next tasks to it at once, so that a thread needs memory for two partial sums, however many tasks there are.
template <class C>
class OrderedSums {
 public:
  // keep: sums are wanted together, after all tasks.
  OrderedSums(int64_t tasks, int64_t tasks_per_sum, int64_t size, bool keep)
      : tasks_(tasks), per_(tasks_per_sum), size_(size), keep_(keep), left_(tasks) {
    for (int64_t n = 0; n < tasks; ++n) left_[n] = nullptr;
  }
  ~OrderedSums() {
    for (int64_t n = 0; n < tasks_; ++n) delete left_[n];
  }
  OrderedSums(const OrderedSums&) = delete;
  OrderedSums& operator=(const OrderedSums&) = delete;

  // Runs tasks begin .. end, one after the other.
  class Runner {
   public:
    Runner(const OrderedSums& sums, int64_t begin, int64_t end) : s_(sums), begin_(begin), end_(end) {}
    ~Runner() {
      delete sum_;
      delete one_;
    }
    Runner(const Runner&) = delete;
    Runner& operator=(const Runner&) = delete;

    // Zeros for a task to add to.
    C* open(int64_t task) {
      Scratch<C>*& to = !has_first(task) ? s_.left_[task] : s_.first(task) == task ? sum_ : one_;
      if (to == nullptr) to = new Scratch<C>(s_.size_);
      clear(to->get(), s_.size_);
      return to->get();
    }

    // Ends a task. Returns the sum if this thread has run all its tasks, nullptr otherwise.
    C* close(int64_t task) {
      if (!has_first(task)) return nullptr;
      const int64_t first = s_.first(task);
      if (first != task) add_to(sum_->get(), one_->get(), s_.size_);
      const bool last = task + 1 == first + s_.per_;
      if (last && !s_.keep_) return sum_->get();
      if (last || task + 1 == end_) {
        s_.left_[first] = sum_;
        sum_ = nullptr;
      }
      return nullptr;
    }

   private:
    bool has_first(int64_t task) const { return s_.first(task) >= begin_; }

    const OrderedSums& s_;
    const int64_t begin_, end_;
    Scratch<C>*sum_ = nullptr, *one_ = nullptr;
  };

  // After all tasks: n elements of a sum from `at` on; nullptr if `close` has returned it.
  C* remaining(int64_t sum, int64_t at, int64_t n) const {
    Scratch<C>* const* const left = left_.get() + sum * per_;
    if (left[0] == nullptr) return nullptr;
    for (int64_t i = 1; i < per_; ++i)
      if (left[i] != nullptr) add_to(left[0]->get() + at, left[i]->get() + at, n);
    return left[0]->get() + at;
  }

 private:
  int64_t first(int64_t task) const { return task / per_ * per_; }

  int64_t tasks_, per_, size_;
  bool keep_;
  Scratch<Scratch<C>*> left_;
};

// The heads whose sums are written of a table that all share: the first, which takes the sums of the others.
// of(h): `size` sums of a head.
template <class Of>
inline Range add_heads(Range heads, const Of& of, int64_t size) {
  for (int64_t h = heads.first + 1; h < heads.end; ++h) add_to(of(heads.first), of(h), size);
  return {0, 1};
}

// The sums of one table; the layout's strides are those of the gradient, which is contiguous by heads.
template <class C>
struct TableSums {
  const HeadTable& table;
  void* out;  // nullptr: not wanted
  Layout<C> layout;
  C factor;
  int64_t start = 0;  // within the sums of a head

  int64_t size() const { return out != nullptr ? layout.size() : 0; }
  C* of(C* head) const { return out != nullptr ? head + start : nullptr; }
  bool shared() const { return out != nullptr && !table.per_head; }
  // From a column on that begins a vector.
  Vectors<C> from(C* sums, int64_t column) const { return {sums + layout.at(0, column), layout.row, layout.step}; }

  // heads(h): the sums of a head. A table that all heads share takes those of all.
  template <class Heads>
  void write(Range range, const Heads& heads) const {
    if (out == nullptr) return;
    if (shared()) range = add_heads(range, [&](int64_t h) { return of(heads(h)); }, size());
    const Axis outer = layout.outer, inner = layout.inner;
    Scratch<C> row(round_up(inner.size, kLanes<C>));
    for (int64_t h = range.first; h < range.end; ++h)
      for (int64_t o = 0; o < outer.size; ++o) {
        for (int64_t i = 0; i < inner.size; i += kLanes<C>)
          store_bytes(row.get() + i, load_bytes<Vec<C>>(of(heads(h)) + layout.at(o, i)) * factor);
        convert_out(table.dtype, row.get(), inner.size, out, h * outer.size * inner.size + o * outer.stride,
                    inner.stride);
      }
  }
};

// Tables of one group of heads, each head's after the other.
template <class C>
struct GradientTables {
  using L = Layout<C>;

  TableSums<C> bias, query_rel, key_rel, value_conv, value_conv_bias, value_conv_scale;
  int64_t size = 0;  // of one head
  bool shared = false;

  explicit GradientTables(const AttentionBackward& p)
      : bias{p.bias, p.grad_bias, L::rows({1, 0}, {p.window(), 1}), 1},
        query_rel{p.query_rel, p.grad_query_rel, L::panels({p.rank, p.window()}, {p.window(), 1}),
                  static_cast<C>(p.rel_scale)},
        key_rel{p.key_rel, p.grad_key_rel, L::panels({p.channels, p.window()}, {p.window(), 1}),
                static_cast<C>(p.scale)},
        value_conv{p.value_conv, p.grad_value_conv, L::rows({p.window(), 1}, {p.channels, p.window()}), 1},
        value_conv_bias{p.value_conv_bias, p.grad_value_conv_bias, L::rows({1, 0}, {p.channels, 1}), 1},
        value_conv_scale{p.value_conv_scale, p.grad_value_conv_scale, L::rows({1, 0}, {1, 1}), 1} {
    for (TableSums<C>* table : {&bias, &query_rel, &key_rel, &value_conv, &value_conv_bias, &value_conv_scale}) {
      table->start = size;
      size += table->size();
      shared = shared || table->shared();
    }
  }

  template <class Heads>
  void write(Range range, const Heads& heads) const {
    for (const TableSums<C>* table : {&bias, &query_rel, &key_rel, &value_conv, &value_conv_bias, &value_conv_scale})
      table->write(range, heads);
  }
};

// Row j of d(k) and d(v) of one group. Keys that the mask hides have none.
template <class C>
inline void write_key(const AttentionBackward& p, const AttentionData<C>& d, int64_t b, int64_t g, int64_t j, C* grad_k,
                      C* grad_v) {
  multiply_by(grad_k, d.width, static_cast<C>(p.scale));
  for (C* row : {grad_k, grad_v}) {
    const HeadRows& to = row == grad_k ? p.grad_k : p.grad_v;
    if (to.data == nullptr) continue;
    if (!d.is_real(b, j)) clear(row, d.width);
    write_row(p, to, b, j, g, p.channels, row);
  }
}

}  // namespace ck::cpu::CK_ISA
