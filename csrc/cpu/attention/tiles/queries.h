// 32 queries of one head: their rows as an operand, what relative terms add to their scores, and which keys each sees.
#pragma once

#include "csrc/cpu/attention/tiles/data.h"

namespace ck::cpu::CK_ISA {

// The n lowest bits.
CK_INLINE uint32_t below(int64_t n) { return n <= 0 ? 0u : n >= 32 ? ~0u : (1u << n) - 1u; }

// Where keys are, seen from the windows of the queries: all keys to the left of all, all to the right, or neither.
enum Side { kLeft, kWindow, kRight };

// Blocks of keys that need the same treatment. clean: every query sees every key.
struct KeyRun {
  int64_t first, end;
  Side side;
  bool clean;
};

class TiledQueries {
 public:
  // own_rows: every query has offsets of its own, also where no table of query_rel gives it them.
  TiledQueries(const TiledData& data, bool own_rows)
      : d_(data),
        p_(data.p),
        own_rows_(own_rows || p_.query_rel.data != nullptr),
        q_(data.width.factors()),
        r_(p_.rel_query.data != nullptr ? data.rank.factors() : 0),
        products_(p_.query_rel.data != nullptr ? ceil_div(p_.window(), kBlock) * 4 * kSums : 0),
        offsets_((own_rows_ ? kBlock : 1) * data.pitch) {}

  // `rows`: bits of those that count; others are zeros and see nothing.
  template <class Machine>
  void load(Machine& m, int64_t b, int64_t h, int64_t block, uint32_t rows) {
    const bool same_head = h == head;
    batch = b;
    head = h;
    first = block * kBlock;
    count = min(kBlock, p_.queries - first);
    read_rows(p_.q, d_.width, b, h, first, rows, q_.get());
    if (p_.rel_query.data != nullptr) read_rows(p_.rel_query, d_.rank, b, h, first, rows, r_.get());
    rows_ = rows;
    find_keys();
    if (p_.query_rel.data != nullptr) multiply_table(m);
    if (!own_rows_ && !same_head) fill_rows(1, nullptr);
  }

  // What is added to scores: relative terms, less `shift` of each row if given.
  void fill(const float* shift) {
    if (own_rows_) fill_rows(kBlock, shift);
  }

  const bf16* q() const { return q_.get(); }
  const bf16* r() const { return p_.rel_query.data != nullptr ? r_.get() : q_.get(); }  // the factor of query_rel
  const QueryPosition& position(int64_t r) const { return d_.positions.of(first)[r]; }

  // What a row adds to scores of 16 keys from j on is at first[offset_of(j)].
  struct RowOffsets {
    const float* first;
    int64_t start, last;

    CK_INLINE int64_t offset_of(int64_t j) const { return max(0, min(j - start, last)); }
    CK_INLINE Floats load(int64_t j) const { return load_floats(first + offset_of(j)); }
  };
  CK_INLINE RowOffsets offsets(int64_t r) const {
    return {offsets_.get() + (own_rows_ ? r * d_.pitch : 0), position(min(r, count - 1)).at - p_.left - 16,
            p_.window() + 16};
  }
  // Of keys beyond it.
  CK_INLINE float edge(int64_t r, Side side) const {
    const int64_t row = own_rows_ ? r : 0;
    return side == kLeft ? left_[row] : right_[row];
  }

  // The keys of a block that a row sees.
  CK_INLINE uint32_t visible(int64_t r, int64_t block) const {
    const int64_t start = block * kBlock;
    const Range range = visible_to(r);
    return d_.keys_there(batch, block) & below(range.end - start) & ~below(range.first - start);
  }
  bool sees(int64_t r, int64_t j) const {
    const Range range = visible_to(r);
    return range.first <= j && j < range.end && d_.is_there(batch, j);
  }

  // Where a block of keys is.
  Side side_of(int64_t block) const {
    const int64_t first_key = block * kBlock, clips = p_.clips();
    if (first_key + kBlock - 1 < least_base_ + clips) return kLeft;
    return first_key >= most_base_ + p_.window() - clips ? kRight : kWindow;
  }

  // Calls body(begin, end) for rows whose positions follow each other.
  template <class Body>
  void each_run(const Body& body) const {
    for (int64_t r = 0, end; r < count; r = end) {
      end = r + 1;
      while (end < count && position(end).at == position(end - 1).at + 1) ++end;
      body(r, end);
    }
  }

  // Runs of the blocks of keys from first_block to end_block; returns their number. Without terms of the queries they
  // are all to the left.
  int64_t find_runs(int64_t first_block, int64_t end_block, KeyRun* out) const {
    int64_t n = 0;
    for (int64_t k = first_block; k < end_block; ++k) {
      const KeyRun one{k, k + 1, p_.has_query_columns() ? side_of(k) : kLeft, is_clean(k)};
      if (n > 0 && out[n - 1].side == one.side && out[n - 1].clean == one.clean)
        out[n - 1].end = one.end;
      else
        out[n++] = one;
    }
    return n;
  }

  int64_t batch = -1, head = -1, first = 0, count = 0;
  int64_t first_block = 0, end_block = 0;  // of the keys that some row sees

 private:
  Range visible_to(int64_t r) const { return rows_ >> r & 1 ? position(r).visible : Range{0, 0}; }

  // The windows of all rows, and the keys that some and that all of them see.
  void find_keys() {
    const QueryPosition &top = position(0), &bottom = position(count - 1);
    least_base_ = top.at - p_.left;
    most_base_ = bottom.at - p_.left;
    if (p_.query_offsets == nullptr && rows_ == ~0u && !top.visible.empty() && !bottom.visible.empty()) {
      seen_ = {top.visible.first, bottom.visible.end};
      seen_by_all_ = {bottom.visible.first, top.visible.end};
    } else {
      seen_ = {p_.keys, 0};
      seen_by_all_ = {0, p_.keys};
      for (int64_t r = 0; r < kBlock; ++r) {
        const int64_t base = position(min(r, count - 1)).at - p_.left;
        least_base_ = min(least_base_, base);
        most_base_ = max(most_base_, base);
        const Range visible = visible_to(r);
        seen_by_all_ = {max(seen_by_all_.first, visible.first), min(seen_by_all_.end, visible.end)};
        if (!visible.empty()) seen_ = {min(seen_.first, visible.first), max(seen_.end, visible.end)};
      }
    }
    first_block = seen_.first / kBlock;
    end_block = seen_.empty() ? first_block : ceil_div(seen_.end, kBlock);
  }

  bool is_clean(int64_t block) const {
    return d_.keys_there(batch, block) == ~0u && seen_by_all_.first <= block * kBlock &&
           (block + 1) * kBlock <= seen_by_all_.end;
  }

  // Blocks of 32 columns that some row meets.
  Range column_blocks() const {
    if (seen_.empty()) return {0, 0};
    const auto within = [&](int64_t c) { return max(0, min(c, p_.window() - 1)); };
    return {within(seen_.first - most_base_) / kBlock, within(seen_.end - 1 - least_base_) / kBlock + 1};
  }

  template <class Machine>
  void multiply_table(Machine& m) {
    const Range blocks = column_blocks();
    const uint32_t nonfinite = nonfinite_rows(r(), d_.rank);
    for (int64_t w = blocks.first; w < blocks.end; ++w)
      d_.tables.multiply(m, r(), nonfinite, head, w, products_.get() + w * 4 * kSums);
  }

  void fill_rows(int64_t rows, const float* shift) {
    const bool clips = p_.clips() && p_.has_query_columns();
    const float* const bias = d_.bias.get() + head * d_.columns;
    Range columns{0, d_.columns};
    if (p_.query_rel.data != nullptr)
      columns = {column_blocks().first * kBlock, min(column_blocks().end * kBlock, d_.columns)};
    const Floats scale = splat(d_.rel_scale);
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = offsets_.get() + r * d_.pitch + 16;
      const float less = shift == nullptr ? 0.0f : shift[r];
      for (int64_t c = columns.first; c < columns.end; c += 16) {
        Floats sum = load_floats(bias + c) - less;
        if (p_.query_rel.data != nullptr) {
          const float* const from = products_.get() + (c / 32 * 4 + r / 16 * 2 + c % 32 / 16) * kSums + r % 16 * 16;
          sum = fused(scale, load_floats(from), sum);
        }
        store_bytes(row + c, sum);
      }
      left_[r] = clips ? row[0] : -less;
      right_[r] = clips ? row[p_.window() - 1] : -less;
      if (!p_.has_query_columns()) continue;
      store_bytes(row - 16, splat(left_[r]));
      store_bytes(row + p_.window(), splat(right_[r]));
    }
  }

  const TiledData& d_;
  const AttentionProblem& p_;
  const bool own_rows_;
  Scratch<bf16> q_, r_;
  Scratch<float> products_, offsets_;
  uint32_t rows_ = 0;
  Range seen_{}, seen_by_all_{};
  int64_t least_base_ = 0, most_base_ = 0;  // keys at column 0
  float left_[kBlock], right_[kBlock];
};

}  // namespace ck::cpu::CK_ISA
