// What keys add to scores: their products with the columns of key_rel.
//
// A key has a column for each place of a query, and the next query has the next column. So the columns that 32 queries
// meet in 32 keys lie in a strip for each key, the next key's shifted by one; read at a distance that is one less than
// that of the strips, they are a square that is turned.
#pragma once

#include "csrc/cpu/attention/tiles/queries.h"

namespace ck::cpu::CK_ISA {

class KeyTerms {
 public:
  explicit KeyTerms(const TiledData& data)
      : d_(data),
        p_(data.p),
        rows_(exists() ? data.key_blocks * data.width.factors() : 0),
        nonfinite_(exists() ? data.key_blocks : 0),
        edges_(exists() ? 2 * data.key_blocks * kBlock : 0),
        products_(exists() ? 4 * kSums : 0),
        strips_(exists() ? kBlock * kPitch : 0) {}

  bool exists() const { return p_.key_rel.data != nullptr; }

  // The keys of a group.
  void load(int64_t b, int64_t g) {
    head_ = -1;
    for (int64_t n = 0; n < d_.key_blocks; ++n) {
      read_rows(p_.k, d_.width, b, g, n * kBlock, d_.keys_there(b, n), rows_.get() + n * d_.width.factors());
      nonfinite_[n] = nonfinite_rows(rows(n), d_.width);
    }
  }

  // Block n of them, natural.
  const bf16* rows(int64_t block) const { return rows_.get() + block * d_.width.factors(); }

  // One of its heads: finds what keys beyond the window add.
  template <class Machine>
  void choose_head(Machine& m, int64_t h) {
    if (h == head_) return;
    head_ = h;
    if (!p_.clips()) {
      clear(edges_.get(), 2 * d_.key_blocks * kBlock);
      return;
    }
    for (int64_t n = 0; n < d_.key_blocks; ++n)
      for (const Side side : {kLeft, kRight}) {
        const int64_t column = side == kLeft ? p_.window() - 1 : 0;
        d_.key_tables.multiply(m, rows(n), nonfinite_[n], h, column / kBlock, products_.get());
        for (int64_t j = 0; j < kBlock; ++j) edge(side)[n * kBlock + j] = product(j, column % kBlock);
      }
  }

  // Adds them to the scores of a block of keys.
  template <class Machine>
  void add(Machine& m, const TiledQueries& queries, int64_t block, float* scores) {
    const Side side = queries.side_of(block);
    if (side != kWindow) {
      for (int64_t half = 0; half < 2 && p_.clips(); ++half) {
        const Floats term = load_floats(edge(side) + block * kBlock + half * 16);
        for (int64_t r = 0; r < kBlock; ++r) add_to_row(scores, half, r, term);
      }
      return;
    }
    queries.each_run([&](int64_t begin, int64_t end) {
      fill(m, block, queries.position(begin).at);
      for (int64_t r = begin; r < end; r += 16)
        for (int64_t half = 0; half < 2; ++half) {
          Words turned[16];
          transpose_words(strips_.get() + kOrigin + half * 16 * (kPitch - 1) + kBlock - 1 + r - begin, (kPitch - 1) * 4,
                          turned);
          for (int64_t i = 0; i < min(16, end - r); ++i) add_to_row(scores, half, r + i, (Floats)turned[i]);
        }
    });
  }

 private:
  // Of strips, and where they begin: products are stored in whole tiles, perhaps before and behind.
  static constexpr int64_t kPitch = 144, kOrigin = 32, kColumns = 2 * kBlock - 1;

  float* edge(Side side) const { return edges_.get() + (side == kLeft ? 0 : d_.key_blocks * kBlock); }
  float& product(int64_t key, int64_t column) const {
    return products_[(key / 16 * 2 + column / 16) * kSums + key % 16 * 16 + column % 16];
  }
  static CK_INLINE void add_to_row(float* scores, int64_t half, int64_t r, Floats term) {
    float* const at = scores + half * 2 * kSums + r * 16;
    store_bytes(at, load_floats(at) + term);
  }

  // The strips of a block of keys, for 32 queries from this position on. The first column of all strips is `low`.
  template <class Machine>
  void fill(Machine& m, int64_t block, int64_t position) {
    const int64_t low = position - (block + 1) * kBlock + 1 + p_.right, window = p_.window();
    for (int64_t w = max(low, 0) / kBlock; w * kBlock < min(low + kColumns, window); ++w) {
      d_.key_tables.multiply(m, rows(block), nonfinite_[block], head_, w, products_.get());
      for (int64_t j = 0; j < kBlock; ++j)
        for (int64_t c = 0; c < kBlock; c += 16)
          store_bytes(strips_.get() + j * kPitch + kOrigin + w * kBlock + c - low, load_floats(&product(j, c)));
    }
    for (int64_t j = 0; j < kBlock; ++j) {
      float* const strip = strips_.get() + j * kPitch + kOrigin;
      const Floats left = splat(edge(kLeft)[block * kBlock + j]), right = splat(edge(kRight)[block * kBlock + j]);
      for (int64_t x = max(0, window - low); x < kColumns; x += 16) store_bytes(strip + x, left);
      for (int64_t x = min(kColumns, -low) - 16; x > -16; x -= 16) store_bytes(strip + x, right);
    }
  }

  const TiledData& d_;
  const AttentionProblem& p_;
  Scratch<bf16> rows_;                        // natural
  Scratch<uint32_t> nonfinite_;               // bits of those of a block
  Scratch<float> edges_, products_, strips_;  // [2 sides][keys]; tiles of one product; [32][kPitch]
  int64_t head_ = -1;
};

}  // namespace ck::cpu::CK_ISA
