// Products of the gradients of scores by columns, of 32 queries or 32 keys: with the table, and with what the table
// met.
#pragma once

#include "csrc/cpu/attention/tiles/data.h"

namespace ck::cpu::CK_ISA {

// Adds what 16 rows of offsets hold beyond the window to its outermost columns.
inline void fold_edges(const Attention& p, float* rows, int64_t pitch) {
  Floats left[16], right[16];
  for (int64_t r = 0; r < 16; ++r) {
    left[r] = load_floats(rows + r * pitch);
    right[r] = load_floats(rows + r * pitch + 16 + p.window());
  }
  const Floats lefts = sum_each<float>(left), rights = sum_each<float>(right);
  for (int64_t r = 0; r < 16; ++r) {
    float* const row = rows + r * pitch + 16;
    if (p.clips()) {
      row[0] += lefts[r];
      row[p.window() - 1] += rights[r];
    }
    for (int64_t c = p.window(); c < pitch - 16; ++c) row[c] = 0;
  }
}

class ColumnProducts {
 public:
  ColumnProducts(int64_t window, const Width& width, bool exist)
      : window_(window),
        blocks_(ceil_div(window, kBlock)),
        width_(width),
        parts_(exist ? blocks_ * kStep : 0),
        sums_(exist ? width.factors() : 0) {}

  // The columns as operands of three parts each, which together are float32, for blocks of 32: of each part left ones
  // [upper, lower], then right ones [first, second], whose products sum over the rows.
  void split(const float* columns, int64_t pitch) {
    for (int64_t w = 0; w < blocks_; ++w) {
      bf16* const to = parts_.get() + w * kStep;
      for (int64_t r = 0; r < 16; ++r) {
        Floats values[2][2] = {};  // rows r and r + 16, columns and those 16 further
        for (int64_t a = 0; a < 2; ++a)
          for (int64_t c = 0; c < 2; ++c) {
            const int64_t column = w * kBlock + c * 16;
            if (column < window_) values[a][c] = load_floats(columns + (r + 16 * a) * pitch + column);
          }
        for (bf16* part = to + r * 32; part < to + kStep; part += 4 * kFactors) {
          Words bits[2][2];
          for (int64_t a = 0; a < 2; ++a)
            for (int64_t c = 0; c < 2; ++c) {
              bits[a][c] = rounded(values[a][c]);
              values[a][c] -= high_halves(bits[a][c]);
            }
          for (int64_t a = 0; a < 2; ++a) {
            store_bytes(part + a * kFactors, join_halves(bits[a][0], bits[a][1]));
            store_bytes(part + (2 + a) * kFactors, join_halves(bits[0][a], bits[1][a]));
          }
        }
      }
    }
  }

  // Columns times the table of a head, for results of bfloat16: first parts, and each with the other's second.
  template <class Machine>
  void multiply_table(Machine& m, const TiledTables& tables, int64_t h) {
    for (int64_t t = 0; t < width_.sixteens; t += 2) {
      float *const upper = sums_.get() + t * kSums, *const lower = upper + width_.sixteens * kSums;
      for (int64_t part = 0; part < tables.parts(); ++part)
        for (int64_t rest = 0; rest < 2 - part; ++rest) {
          const bf16* const a = parts_.get() + rest * 4 * kFactors;
          const bf16* const b = tables.by_rows(h, 0, part) + t * kFactors;
          multiply_block(m, part == 0 && rest == 0, blocks_, {a, a + kFactors, 64, kStep},
                         {b, b + kFactors, tables.step()}, {upper, upper + kSums, lower, lower + kSums});
        }
    }
  }
  // What that gave: tiles [2 halves of the rows][rank / 16].
  const float* sums() const { return sums_.get(); }

  // Rows, turned, times columns, added to the sums of a table.
  template <class Machine>
  void multiply_rows(Machine& m, const bf16* turned, float* sums) const {
    for (int64_t t = 0; t < width_.sixteens; t += 2)
      for (int64_t w = 0; w < blocks_; ++w) {
        const bf16 *const a = turned + t * kFactors, *const b = parts_.get() + w * kStep + 2 * kFactors;
        float *const upper = sums + 2 * (t * blocks_ + w) * kSums, *const lower = upper + 2 * blocks_ * kSums;
        multiply_block(m, false, kParts, {a, a + kFactors, 64, 0}, {b, b + kFactors, 4 * kFactors},
                       {upper, upper + kSums, lower, lower + kSums});
      }
  }
  // The same of natural rows that were left out, because they are not finite.
  void add_nonfinite(uint32_t which, const bf16* rows, const float* columns, int64_t pitch, float* sums) const {
    for (int64_t r = 0; r < kBlock && which >> r != 0; ++r)
      for (int64_t c = 0; which >> r & 1 && c < window_; ++c) {
        const float score = columns[r * pitch + c];
        if (score == 0.0f) continue;
        for (int64_t t = 0; t < width_.sixteens; ++t)
          for (int64_t n = 0; n < 16; ++n)
            sums[(2 * t * blocks_ + c / 16) * kSums + n * 16 + c % 16] +=
                score * to_float(rows[r * width_.padded + channel_of(t, n)]);
      }
  }

 private:
  static constexpr int64_t kParts = 3, kStep = kParts * 4 * kFactors;  // of a block of columns

  int64_t window_, blocks_;
  const Width& width_;
  Scratch<bf16> parts_;
  Scratch<float> sums_;
};

}  // namespace ck::cpu::CK_ISA
