// What gradients of scores pass on to relative terms.
//
// The gradient of a table's column lies on a diagonal of pairs: each pair within the window goes to its column of a
// strip of shared memory, those left and right of it are summed in registers. From the strip, products on tensor cores
// lead to the gradients of the positions and of the table.
#pragma once

#include "csrc/cuda/attention/relative.cuh"

namespace ck::cuda {

// Sums of 16 positions in shared memory, [16][pitch], to which products are added.
struct SharedSums {
  float* sums;
  int pitch;

  CK_DEVICE float factor() const { return 1; }
  // product(out, n) adds to the 8 numbers from n on of each position.
  template <class Product>
  CK_DEVICE void add(int64_t size, int lane, const Product& product) const {
#pragma unroll 1
    for (int n = 0; n < size; n += 8) {
      float out[4] = {};
      product(out, n);
      for (int e = 0; e < 4; ++e) sums[(lane / 4 + e / 2 * 8) * pitch + n + lane % 4 * 2 + e % 2] += out[e];
    }
  }
};

// The same for sums of `size` of D numbers in registers.
template <int D, class Product>
CK_DEVICE void add_to_registers(float (&sums)[D / 8][4], int64_t size, const Product& product) {
#pragma unroll
  for (int n = 0; n < D; n += 8)
    if (n < size) product(sums[n / 8], n);
}

// The strip of one warp, [16 own positions][columns], and the sums that it is added to.
template <class T, class Rows, class Sums>
struct GradientStrip {
  float* strip;  // in shared memory
  int pitch;
  bool whole;      // it holds all columns and is added up once, at the end; otherwise those of one tile at a time
  Rows rows;       // the own positions' vectors, in shared memory
  const T* table;  // [terms][W][table_pitch]
  int64_t terms;
  int W;
  int64_t table_pitch;
  bool wants_sums;
  Sums sums;       // [16][table_pitch] += strip times table^T, times its factor
  float* partial;  // [W][size] += strip^T times rows; nullptr: not wanted
  int size;
  float* bias;  // [W] += the strip's columns; nullptr: not wanted
  int lane;

  CK_DEVICE void clear() const {
    __syncwarp();
    for (int e = opaque(lane); e < 16 * pitch; e += 32) strip[e] = 0;
    __syncwarp();
  }

  // Adds the strip, which begins at columns.first, to the sums. What it holds from columns.end on does not count.
  CK_DEVICE void accumulate(Range columns) const {
    const int g = lane / 4, pair = lane % 4 * 2;
    __syncwarp();
#pragma unroll 1
    for (int c0 = columns.first; c0 < columns.end; c0 += 16) {
      const auto ds = [&](int row, int c) {
        return c0 + c < columns.end ? strip[row * pitch + c0 + c - columns.first] : 0.0f;
      };
      if (wants_sums) {
        Two<T> by_row[4];  // [16 rows, 16 columns]
        const float factor = sums.factor();
        for (int e = 0; e < 4; ++e) {
          const int m = g + e % 2 * 8, k = pair + e / 2 * 8;
          by_row[e] = round_two<T>(ds(m, k) * factor, ds(m, k + 1) * factor);
        }
        sums.add(table_pitch, lane, [&](float (&out)[4], int n) {
#pragma unroll 1
          for (int64_t term = 0; term < terms; ++term) {
            const T* const from = table + term * W * table_pitch + n + g;
            const auto number = [&](int c) { return from[min(c0 + c, W - 1) * table_pitch]; };
            const Two<T> b[2] = {join_two<T>(number(pair), number(pair + 1)),
                                 join_two<T>(number(pair + 8), number(pair + 9))};
            mma_m16n8k16<T>(out, by_row, b);
          }
        });
      }
      if (partial != nullptr) {
        Two<T> by_column[4];  // [16 columns, 16 rows]
        for (int e = 0; e < 4; ++e) {
          const int m = g + e % 2 * 8, k = pair + e / 2 * 8;
          by_column[e] = round_two<T>(ds(k, m), ds(k + 1, m));
        }
#pragma unroll 1
        for (int n = 0; n < table_pitch; n += 16) {
          Two<T> b[2][2];
          rows.load_right(b, n, lane);
          for (int y = 0; y < 2; ++y) {
            float out[4] = {};
            mma_m16n8k16<T>(out, by_column, b[y]);
            for (int e = 0; e < 4; ++e) {
              const int c = c0 + g + e / 2 * 8, d = n + 8 * y + pair + e % 2;
              if (c >= columns.end || d >= size) continue;
              if (!is_finite(out[e])) {
                // 0 times what is not finite: again, by selection.
                out[e] = 0;
#pragma unroll 1
                for (int row = 0; row < 16; ++row) {
                  const float value = ds(row, c - c0);
                  if (value != 0.0f) out[e] += value * widen(rows.number(row, d));
                }
              }
              partial[int64_t{c} * size + d] += out[e];
            }
          }
        }
      }
      if (bias != nullptr && lane < 16 && c0 + lane < columns.end) {
        float sum = 0;
        for (int row = 0; row < 16; ++row) sum += ds(row, lane);
        bias[c0 + lane] += sum;
      }
    }
    __syncwarp();
  }

  // outer[side][half]: this lane's sums left and right of the window.
  CK_DEVICE void finish(float (&outer)[2][2], bool clips) const {
    const auto add = [&](int side, int column) {
      for (int half = 0; half < 2; ++half) {
        const float sum = row_sum(side == 0 ? outer[0][half] : outer[1][half]);
        if (lane % 4 == 0) strip[(lane / 4 + 8 * half) * pitch + column] += sum;
      }
    };
    // Column 0 and column W - 1, of the whole strip or of one that has nothing else.
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const int column = side == 0 ? 0 : W - 1;
      __syncwarp();
      if (!whole) clear();
      if (clips) add(side, whole ? column : 0);
      if (whole && side == 0) continue;
      const Range columns{whole ? 0 : column, whole ? W : column + 1};
      if (whole || clips) accumulate(columns);
    }
  }
};

// Puts the score gradients of a tile of pairs into the strip, and those beyond the window into outer[side][half].
template <class T, Side kOwn, int kOther, class Rows, class Sums>
CK_DEVICE void scatter_gradients(const float (&ds)[kOther / 8][4], const GradientStrip<T, Rows, Sums>& to,
                                 const PairTile<kOwn, kOther>& pairs, float (&outer)[2][2]) {
  const int lane = opaque(to.lane), row = lane / 4, pair = lane % 4 * 2;
  const Range columns = pairs.columns();
  if (columns.first >= columns.end) {
    // Most tiles lie on one side of the window: all pairs go to one sum.
    const bool is_left = pairs.is_left();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = is_left ? outer[0][half] : outer[1][half];
#pragma unroll
      for (int n = 0; n < kOther / 8; ++n) sum = sum + ds[n][2 * half] + ds[n][2 * half + 1];
      (is_left ? outer[0][half] : outer[1][half]) = sum;
    }
    return;
  }
  if (!to.whole) to.clear();
  const int base = pairs.base();
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = row + e / 2 * 8, col = 8 * n + pair + e % 2;
      const int c = kOwn == Side::kQueries ? base + col - r : base + r - col;
      if (c < 0) {
        outer[0][e / 2] += ds[n][e];
      } else if (c >= to.W) {
        outer[1][e / 2] += ds[n][e];
      } else {
        to.strip[r * to.pitch + c - (to.whole ? 0 : columns.first)] = ds[n][e];
      }
    }
  if (!to.whole) to.accumulate(columns);
}

}  // namespace ck::cuda
