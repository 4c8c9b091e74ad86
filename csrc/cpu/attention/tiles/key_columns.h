// What follows from the gradients of scores by the columns of key_rel: its gradient, and what the term adds to those of
// keys. A key's columns are those of key_terms.h, and are summed over all queries of a head.
#pragma once

#include "csrc/cpu/attention/tiles/column_products.h"
#include "csrc/cpu/attention/tiles/key_terms.h"

namespace ck::cpu::CK_ISA {

class KeyColumns {
 public:
  // blocks: of keys whose gradients are held together.
  KeyColumns(const AttentionBackward& p, const TiledData& data, int64_t blocks)
      : p_(p),
        d_(data),
        exists_(p.key_rel.data != nullptr && (p.grad_k.data != nullptr || p.grad_key_rel != nullptr)),
        pitch_(round_up(p.window() + 32, 16)),
        sums_(exists_ ? data.key_blocks * kBlock * pitch_ : 0),
        held_(exists_ ? blocks * 4 * kSums : 0),
        turned_(exists_ ? data.width.factors() : 0),
        products_(p.window(), data.width, exists_) {}

  bool exist() const { return exists_; }

  void clear_sums() { clear(sums_.get(), d_.key_blocks * kBlock * pitch_); }

  // Gradients of scores of 32 queries and of block n of those held: [2 halves of the keys][32][16].
  float* held(int64_t n) { return held_.get() + n * 4 * kSums; }

  // Adds those of a block of keys.
  void add(const TiledQueries& queries, int64_t block, const float* scores) {
    const Side side = queries.side_of(block);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = block * kBlock + half * 16;
      const float* const from = scores + half * 2 * kSums;
      if (side == kWindow)
        queries.each_run([&](int64_t begin, int64_t end) { add_run(queries, begin, end, first, from); });
      else if (p_.clips())
        add_beyond(side, first, from);
    }
  }

  // After the last query of a head. by_rows, nonfinite: of the keys; head: sums of its tables; grad_k: sums of d(k).
  template <class Machine>
  void finish(Machine& m, int64_t h, const KeyTerms& keys, const bf16* by_rows, const uint32_t* nonfinite,
              float* key_rel, float* grad_k) {
    for (int64_t n = 0; n < d_.key_blocks; ++n) {
      float* const rows = sums_.get() + n * kBlock * pitch_;
      for (int64_t half = 0; half < 2; ++half) fold_edges(p_, rows + half * 16 * pitch_, pitch_);
      products_.split(rows + 16, pitch_);
      if (p_.grad_k.data != nullptr) {
        products_.multiply_table(m, d_.key_tables, h);
        for (int64_t tile = 0; tile < 2 * d_.width.sixteens; ++tile) add_turned(tile, grad_k + n * d_.width.factors());
      }
      if (key_rel == nullptr) continue;
      pack_turned(by_rows + n * d_.width.factors(), d_.width, turned_.get());
      products_.multiply_rows(m, turned_.get(), key_rel);
      products_.add_nonfinite(nonfinite[n], keys.rows(n), rows + 16, pitch_, key_rel);
    }
  }

 private:
  float* row(int64_t key) const { return sums_.get() + key * pitch_; }

  // Of rows whose positions follow each other, and 16 keys.
  void add_run(const TiledQueries& queries, int64_t begin, int64_t end, int64_t key, const float* scores) {
    for (int64_t r = begin; r < end; r += 16) {
      alignas(64) float square[kSums] = {};
      memcpy(square, scores + r * 16, static_cast<size_t>(min(16, end - r)) * 64);
      Words turned[16];
      transpose_words(square, 64, turned);
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t column = queries.position(r).at - (key + j) + p_.right;
        float* const to = row(key + j) + max(0, min(column + 16, p_.window() + 16));
        store_bytes(to, load_floats(to) + (Floats)turned[j]);
      }
    }
  }

  // Of all rows, and 16 keys beyond the window.
  void add_beyond(Side side, int64_t key, const float* scores) {
    Floats sum = {};
    for (int64_t r = 0; r < kBlock; ++r) sum += load_floats(scores + r * 16);
    for (int64_t j = 0; j < 16; ++j) row(key + j)[side == kLeft ? p_.window() + 16 : 0] += sum[j];
  }

  // Adds a tile of keys times the table to d(k), which is turned.
  void add_turned(int64_t tile, float* grad_k) const {
    Words turned[16];
    transpose_words(products_.sums() + tile * kSums, 64, turned);
    for (int64_t i = 0; i < 16; ++i) {
      float* const to = grad_k + tile * kSums + i * 16;
      store_bytes(to, load_floats(to) + (Floats)turned[i]);
    }
  }

  const AttentionBackward& p_;
  const TiledData& d_;
  const bool exists_;
  const int64_t pitch_;
  Scratch<float> sums_, held_;  // [keys][pitch_], as the rows of offsets
  Scratch<bf16> turned_;
  ColumnProducts products_;
};

}  // namespace ck::cpu::CK_ISA
