// What the tasks of one call of attention on tiles share: positions, which keys are there, and tables as operands.
#pragma once

#include "csrc/cpu/attention/pack.h"
#include "csrc/cpu/attention/tiles/operands.h"

namespace ck::cpu::CK_ISA {

// Weights of scores to base 2 within this distance of a common shift are numbers far from the ends of their type.
constexpr float kReach = 50.0f;

// A table whose columns meet queries or keys, in one part (a bfloat16 table) or in three, which together are float32
// (others: its bfloat16 numbers, those of the rest, and of what that leaves).
class TiledTables {
 public:
  // rank: its rows. by_rows: for gradients.
  TiledTables(const Attention& p, const HeadTable& table, const Width& rank, bool by_rows)
      : rank_(rank),
        table_(table),
        parts_(table.dtype == Dtype::kBFloat16 ? 1 : 3),
        tiles_(ceil_div(p.window(), kBlock)),
        count_(table.data == nullptr ? 0 : (table.per_head ? p.heads : 1)),
        by_channels_(size()),
        by_rows_(by_rows ? size() : 0),
        length_(count_) {
    if (count_ == 0) return;
    Scratch<float> values(p.window() * rank.channels);
    Scratch<bf16> rows(rank.factors());
    for (int64_t n = 0; n < count_; ++n) {
      for (int64_t d = 0; d < rank.channels; ++d) read(p.window(), n, d, values.get() + d * p.window());
      length_[n] = longest_column(p, values.get());
      for (int64_t w = 0; w < tiles_; ++w)
        for (int64_t part = 0; part < parts_; ++part) {
          fill(p, values.get(), w, rows.get());
          pack_by_channels(rows.get(), rank.padded, rank, by_channels_.get() + at(n, w, part));
          if (by_rows) pack_by_rows(rows.get(), rank.padded, rank, by_rows_.get() + at(n, w, part));
        }
    }
  }

  int64_t parts() const { return parts_; }
  // The operand of columns 32 * w .. of a head, and the distance to the next 32.
  const bf16* by_channels(int64_t h, int64_t w, int64_t part) const {
    return by_channels_.get() + at(table(h), w, part);
  }
  const bf16* by_rows(int64_t h, int64_t w, int64_t part) const { return by_rows_.get() + at(table(h), w, part); }
  int64_t step() const { return parts_ * rank_.factors(); }
  // 32 natural rows times columns 32 * w .. of a head: tiles [2 halves of the rows][2 halves of the columns]. Bits of
  // `nonfinite` are rows that meet the first part alone, because infinity times other parts has other signs, or is NaN.
  template <class Machine>
  void multiply(Machine& m, const bf16* rows, uint32_t nonfinite, int64_t h, int64_t w, float* to) const {
    for (int64_t part = 0; part < parts_; ++part) add_part(m, rows, h, w, part, to);
    if (parts_ == 1 || nonfinite == 0) return;
    alignas(64) float first[4 * kSums];
    add_part(m, rows, h, w, 0, first);
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t half = 0; nonfinite >> r & 1 && half < 2; ++half) {
        const int64_t at = (r / 16 * 2 + half) * kSums + r % 16 * 16;
        store_bytes(to + at, load_floats(first + at));
      }
  }
  // Of a column of a head.
  float length(int64_t h) const { return count_ == 0 ? 0.0f : length_[table(h)]; }

 private:
  int64_t size() const { return count_ * tiles_ * step(); }
  int64_t table(int64_t h) const { return table_.per_head ? h : 0; }
  int64_t at(int64_t n, int64_t w, int64_t part) const { return (n * tiles_ + w) * step() + part * rank_.factors(); }

  template <class Machine>
  CK_INLINE void add_part(Machine& m, const bf16* rows, int64_t h, int64_t w, int64_t part, float* to) const {
    const bf16* const columns = by_channels(h, w, part);
    multiply_block(m, part == 0, rank_.pairs, {rows, rows + 16 * rank_.padded, rank_.padded * 2, 32},
                   {columns, columns + rank_.pairs * kFactors, kFactors},
                   {to, to + kSums, to + 2 * kSums, to + 3 * kSums});
  }

  void read(int64_t window, int64_t n, int64_t d, float* to) const {
    Scratch<float> row(round_up(window, 16));
    convert_in(table_.dtype, table_.data, n * table_.head + d * table_.row, table_.column, window, 1.0f, row.get());
    memcpy(to, row.get(), static_cast<size_t>(window) * sizeof(float));
  }

  float longest_column(const Attention& p, const float* values) const {
    double longest = 0;
    for (int64_t c = 0; c < p.window(); ++c) {
      double square = 0;
      for (int64_t d = 0; d < rank_.channels; ++d)
        square += static_cast<double>(values[d * p.window() + c]) * static_cast<double>(values[d * p.window() + c]);
      if (!(square <= longest)) longest = square;
    }
    return static_cast<float>(::sqrt(longest));
  }

  // Columns 32 * w .. as natural rows; what is left of their values is the next part.
  void fill(const Attention& p, float* values, int64_t w, bf16* rows) const {
    memset(static_cast<void*>(rows), 0, static_cast<size_t>(rank_.factors()) * sizeof(bf16));
    for (int64_t c = 0; c < min(kBlock, p.window() - w * kBlock); ++c)
      for (int64_t d = 0; d < rank_.channels; ++d) {
        float& value = values[d * p.window() + w * kBlock + c];
        bf16& to = rows[c * rank_.padded + d];
        from_float(value, to);
        const float rest = value - to_float(to);
        value = rest - rest == 0.0f ? rest : 0.0f;
      }
  }

  const Width& rank_;
  const HeadTable& table_;
  int64_t parts_, tiles_, count_;
  Scratch<bf16> by_channels_, by_rows_;
  Scratch<float> length_;
};

struct TiledData {
  const AttentionProblem& p;
  bool threads;
  Width width, rank;  // of q, k and v; of the factor of query_rel
  QueryPositions positions;
  int64_t key_blocks, query_blocks;
  int64_t columns;  // in whole vectors
  int64_t pitch;    // of a row of offsets: 16 x the left edge, the columns, 16 x the right edge
  float scale, rel_scale;
  TiledTables tables, key_tables;  // of query_rel, of key_rel
  Scratch<float> bias;             // [heads][columns]
  // By head: the middle of what bias may add, and how far from it that may be.
  Scratch<float> bias_middle, bias_reach;
  Scratch<uint32_t> there;  // [batch][key_blocks]: bits of keys

  TiledData(const AttentionProblem& problem, bool gradients)
      : p(problem),
        threads(p.batch * p.heads * p.queries * p.keys * p.channels >= 1 << 15),
        width(p.channels),
        rank(p.rank),
        positions(p),
        key_blocks(ceil_div(p.keys, kBlock)),
        query_blocks(ceil_div(p.queries, kBlock)),
        columns(p.has_query_columns() ? round_up(p.window(), 16) : 0),
        pitch(round_up((p.has_query_columns() ? p.window() : 0) + 32, 16)),
        scale(static_cast<float>(p.scale * kLog2e)),
        rel_scale(static_cast<float>(p.rel_scale * kLog2e)),
        tables(p, p.query_rel, rank, gradients),
        key_tables(p, p.key_rel, width, gradients),
        bias(p.heads * columns),
        bias_middle(p.heads),
        bias_reach(p.heads),
        there(p.batch * key_blocks) {
    memset(bias.get(), 0, static_cast<size_t>(p.heads * columns) * sizeof(float));
    for (int64_t h = 0; p.bias.data != nullptr && h < p.heads; ++h)
      convert_in(p.bias.dtype, p.bias.data, h * p.bias.head, p.bias.column, p.window(), static_cast<float>(kLog2e),
                 bias.get() + h * columns);
    for (int64_t c = 0; c < p.heads * columns; ++c) bias[c] = with_plain_nan(bias[c]);
    for (int64_t h = 0; h < p.heads; ++h) find_bias_range(h);
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t n = 0; n < key_blocks; ++n) {
        uint32_t bits = 0;
        for (int64_t j = n * kBlock; j < min((n + 1) * kBlock, p.keys); ++j)
          if (p.key_mask == nullptr || p.key_mask[b * p.mask_batch + j * p.mask_key]) bits |= 1u << (j % kBlock);
        there[b * key_blocks + n] = bits;
      }
  }

  uint32_t keys_there(int64_t b, int64_t block) const { return there[b * key_blocks + block]; }
  bool is_there(int64_t b, int64_t j) const { return keys_there(b, j / kBlock) >> (j % kBlock) & 1; }

 private:
  void find_bias_range(int64_t h) {
    float top = 0, bottom = 0;  // without a relative term
    for (int64_t c = 0; p.bias.data != nullptr && c < p.window(); ++c) {
      const float value = bias[h * columns + c];
      if (!(value <= top)) top = value;
      if (!(value >= bottom)) bottom = value;
    }
    bias_reach[h] = (top - bottom) * 0.5f;
    bias_middle[h] = (top + bottom) * 0.5f;
  }
};

}  // namespace ck::cpu::CK_ISA
