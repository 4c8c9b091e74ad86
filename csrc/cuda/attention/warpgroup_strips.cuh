// Strips of columns for the backward kernels of warpgroups: what the queries' terms add to a tile of pairs near the
// window, 16 queries by all columns that the pairs have, so that each pair is found at a fixed place. Beside the window
// a strip has what lies left or right of it.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/warpgroup_tiles.cuh"

namespace ck::cuda {

// The strip of 16 queries and the kKeys keys of a tile: a pair has column lowest + 15 + key - query. 8 floats beyond a
// multiple of 32, or as many short of it, so that pairs of columns are stored without bank conflicts.
template <int kKeys>
struct PairStrip {
  static constexpr int kColumns = kKeys + 16, kPitch = pair_strip_pitch(kKeys);

  float* strip;  // [16][kPitch], at a multiple of 8 bytes
  int lowest;

  CK_DEVICE static constexpr int place(int query, int key) { return query * (kPitch - 1) + 15 + key; }

  // By a warp. rows: those of the queries that query_rel is multiplied with. added(side, half): what stands in all
  // columns left of the window (0), within it (1, besides what the columns add) and right of it (2), for rows lane / 4
  // and lane / 4 + 8.
  template <class T, class Added>
  CK_DEVICE void fill(const Relative<T>& rel, const TileRows& rows, const Added& added) const {
    const int lane = opaque(rel.lane), row = lane / 4, pair = lane % 4 * 2, W = rel.W;
    const float* const bias = rel.bias();
    const T* const table = rel.p.query_rel.data == nullptr ? nullptr : rel.query_rel();
    const float factor = rel.t.rel_factor, within[2] = {added(1, 0), added(1, 1)};
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < kColumns; n += 16) {
      const int c = lowest + n;
      float out[2][4] = {};
      if (table != nullptr && c + 16 > 0 && c < W) add_products(out, rel, table, c, rows, row, lane);
      const bool crosses = c < 0 || c + 16 > W;
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float of_bias[2] = {};
        if (bias != nullptr)
          for (int e = 0; e < 2; ++e) of_bias[e] = bias[min(max(c + 8 * y + pair + e, 0), W - 1)];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float value[2];
          for (int e = 0; e < 2; ++e) value[e] = out[y][2 * half + e] * factor + (of_bias[e] + within[half]);
          if (crosses) {
            const float left = added(0, half), right = added(2, half);
            for (int e = 0; e < 2; ++e) {
              const int column = c + 8 * y + pair + e;
              value[e] = column < 0 ? left : column >= W ? right : value[e];
            }
          }
          *reinterpret_cast<float2*>(strip + (row + 8 * half) * kPitch + n + 8 * y + pair) =
              make_float2(value[0], value[1]);
        }
      }
    }
    __syncwarp();
  }

 private:
  // out[y] += the rows times columns c + 8 y .. c + 8 y + 7 of the table.
  template <class T>
  CK_DEVICE static void add_products(float (&out)[2][4], const Relative<T>& rel, const T* table, int c,
                                     const TileRows& rows, int row, int lane) {
    const int64_t pitch = rel.t.rank_pitch;
    const T* columns[2];
    for (int y = 0; y < 2; ++y) columns[y] = table + min(max(c + 8 * y + row, 0), rel.W - 1) * pitch + lane % 4 * 2;
#pragma unroll 1
    for (int64_t term = 0; term < rel.t.query_terms; ++term)
#pragma unroll 1
      for (int k = 0; k < pitch; k += 16) {
        uint32_t a[4];
        rows.load_left(a, 0, k, lane);
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const T* const from = columns[y] + term * rel.W * pitch + k;
          const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(from),
                                 *reinterpret_cast<const uint32_t*>(from + 8)};
          mma_m16n8k16<T>(out[y], a, b);
        }
      }
  }
};

// Which pairs attend, as score_pairs says. real: the keys that the mask leaves.
template <Side kOwn>
CK_DEVICE uint32_t seen_pairs(const PairTile<kOwn, 32>& pairs, unsigned real, int lane) {
  lane = opaque(lane);
  const int row = lane / 4, pair = lane % 4 * 2;
  uint32_t seen = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Range partners = pairs.partners(pairs.p, pairs.tile, pairs.own + row + 8 * half);
    const int first = partners.first - pairs.other - pair, end = partners.end - pairs.other - pair;
    const unsigned there = kOwn == Side::kQueries ? real >> pair : (real >> (row + 8 * half) & 1u) != 0 ? ~0u : 0u;
#pragma unroll
    for (int n = 0; n < 4; ++n)
      for (int e = 0; e < 2; ++e) {
        const int other = 8 * n + e;
        const bool sees = other >= first && other < end && (there >> other & 1u) != 0;
        seen |= uint32_t{sees} << (4 * n + 2 * half + e);
      }
  }
  return seen;
}

// Scores of 16 queries and the kKeys keys from pairs.other on, where the window crosses them or not all pairs are seen:
// products s become scores. left, right: what the queries add beside the window; the rest as of near_tile_scores.
template <class T, int kKeys>
CK_DEVICE void near_scores_of_queries(float (&s)[kKeys / 8][4], uint32_t (&seen)[kKeys / 32], const Relative<T>& rel,
                                      const PairTile<Side::kQueries, kKeys>& pairs, const unsigned (&real)[kKeys / 32],
                                      const float (&left)[2], const float (&right)[2], const TileRows& query_rows,
                                      const TileRows& key_rows) {
  using Strip = PairStrip<kKeys>;
  const Strip strip{rel.strip, pairs.lowest()};
  strip.fill(rel, query_rows, [&](int side, int half) {
    return side == 0 ? left[half] : side == 1 ? 0.0f : right[half];
  });
  rel.add_others(pairs, pairs.columns(), strip.lowest, key_rows);
  const int lane = opaque(rel.lane), row = lane / 4, pair = lane % 4 * 2;
  const float* const mine = rel.strip + Strip::place(row, pair);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
    for (int e = 0; e < 4; ++e)
      s[n][e] = s[n][e] * rel.t.score_factor + mine[Strip::place(e / 2 * 8, 8 * n + e % 2) - 15];
  if (rel.edges != nullptr) {
    const int positions = static_cast<int>(rel.p.keys), column = strip.lowest + 15 + pair - row;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        const int c = column + 8 * n + e % 2 - e / 2 * 8, key = pairs.other + 8 * n + pair + e % 2;
        if ((c < 0 || c >= rel.W) && key < positions) s[n][e] += rel.edges[(c < 0 ? 0 : positions) + key];
      }
  }
#pragma unroll
  for (int sub = 0; sub < kKeys / 32; ++sub) {
    const PairTile<Side::kQueries, 32> part(pairs.p, pairs.tile, pairs.own, pairs.other + 32 * sub);
    seen[sub] = part.seen(real[sub]) ? kEveryPair : seen_pairs(part, real[sub], lane);
  }
}

// What gradients of scores pass on to rel_query and query_rel where the window is longer than a tile of pairs: as a
// GradientStrip that is added up after each tile, but of numbers of type T, so that products read it as it is.
template <class T, int kKeys>
struct BandGradients {
  using Strip = PairStrip<kKeys>;
  static constexpr int kPitch = Strip::kPitch;  // an odd number of 16 bytes, without bank conflicts

  T* strip;  // [16][kPitch], at a multiple of 16 bytes
  const Relative<T>& rel;
  const TileRows& rows;  // of rel_query
  SharedSums sums;       // [16][rank_pitch] += strip times table^T
  float* partial;        // [W][rank] += strip^T times rows; nullptr: not wanted

  CK_DEVICE void add(const float (&ds)[kKeys / 8][4], const PairTile<Side::kQueries, kKeys>& pairs,
                     float (&outer)[2][2]) const {
    const int lowest = pairs.lowest(), W = rel.W;
    scatter(ds, lowest, lowest < 0 || lowest + kKeys + 15 > W, outer);
    const int lane = opaque(rel.lane), pitch = static_cast<int>(rel.t.rank_pitch);
    const Range inside{max(0, -lowest) / 16 * 16, min(kKeys + 16, W - lowest)};
#pragma unroll 1
    for (int n = 0; n < pitch; n += 16) {
      add_to_rows(inside, lowest, n, pitch, lane);
      if (partial != nullptr) add_to_columns(inside, lowest, n, lane);
    }
    __syncwarp();
  }

 private:
  // Pairs beyond the window are left out, and summed in outer[side][half].
  CK_DEVICE void scatter(const float (&ds)[kKeys / 8][4], int lowest, bool crosses, float (&outer)[2][2]) const {
    const int lane = opaque(rel.lane), row = lane / 4, pair = lane % 4 * 2;
    __syncwarp();
    // 16 numbers of each row belong to no pair.
    const int x = lane % 16;
#pragma unroll
    for (int r = 0; r < 16; r += 2) {
      const int of = r + lane / 16;
      strip[of * kPitch + (x < 15 - of ? x : kKeys + x)] = T{};
    }
    T* const mine = strip + Strip::place(row, pair);
    const int column = lowest + 15 + pair - row;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int half = 0; half < 2; ++half) {
        uint32_t both = narrow_pair<T>(ds[n][2 * half], ds[n][2 * half + 1]);
        if (crosses)
          for (int e = 0; e < 2; ++e) {
            const int c = column + 8 * n + e - 8 * half;
            if (c >= 0 && c < rel.W) continue;
            both &= e == 0 ? 0xFFFF0000u : 0xFFFFu;
            (c < 0 ? outer[0][half] : outer[1][half]) += ds[n][2 * half + e];
          }
        for (int e = 0; e < 2; ++e)
          mine[Strip::place(8 * half, 8 * n + e) - 15].bits = static_cast<uint16_t>(both >> (16 * e));
      }
    __syncwarp();
  }

  // The right factors of two products for 16 numbers from n on of rows k: words(k) has those of a lane, n + lane / 4 *
  // 2 and the next one. A lane gets 4 numbers side by side of the results, from lane % 4 * 4 on.
  template <class Words>
  CK_DEVICE static void load_factors(uint32_t (&b)[2][2], int lane, const Words& words) {
    const int pair = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t x = words(pair + 8 * k), y = words(pair + 8 * k + 1);
      b[0][k] = (x & 0xFFFFu) | y << 16;
      b[1][k] = x >> 16 | (y & 0xFFFF0000u);
    }
  }

  CK_DEVICE void add_to_rows(const Range& inside, int lowest, int n, int pitch, int lane) const {
    float out[2][4] = {};
    const T* const table = rel.query_rel() + n + lane / 4 * 2;
#pragma unroll 1
    for (int c = inside.first; c < inside.end; c += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, strip + lane % 16 * kPitch + c + lane / 16 * 8);
#pragma unroll 1
      for (int64_t term = 0; term < rel.t.query_terms; ++term) {
        uint32_t b[2][2];
        load_factors(b, lane, [&](int k) {
          const int column = lowest + c + k;
          return column >= 0 && column < rel.W
                     ? *reinterpret_cast<const uint32_t*>(table + (term * rel.W + column) * pitch)
                     : 0u;
        });
        for (int y = 0; y < 2; ++y) mma_m16n8k16<T>(out[y], a, b[y]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      add_four(sums.sums + (lane / 4 + 8 * half) * sums.pitch + n + lane % 4 * 4, out, half);
  }

  CK_DEVICE void add_to_columns(const Range& inside, int lowest, int n, int lane) const {
    const int rank = static_cast<int>(rel.p.rank), d = n + lane % 4 * 4, x = n + lane / 4 * 2;
    uint32_t b[2][2];
    load_factors(b, lane,
                 [&](int k) { return *reinterpret_cast<const uint32_t*>(rows.at(k, x / 8) + x % 8 * sizeof(T)); });
#pragma unroll 1
    for (int c = inside.first; c < inside.end; c += 16) {
      uint32_t a[4];  // [16 columns, 16 rows]
      ldmatrix_x4_trans(a, strip + (lane % 8 + lane / 16 * 8) * kPitch + c + lane / 8 % 2 * 8);
      float out[2][4] = {};
      for (int y = 0; y < 2; ++y) mma_m16n8k16<T>(out[y], a, b[y]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = c + lane / 4 + 8 * half, column = lowest + at;
        if (column < 0 || column >= rel.W || d >= rank) continue;
        const float sum = (out[0][2 * half] + out[1][2 * half]) + (out[0][2 * half + 1] + out[1][2 * half + 1]);
        if (!is_finite(sum)) select_finite(out, half, at, d);
        float* const to = partial + int64_t{column} * rank + d;
        if (rank % 4 == 0) {
          add_four(to, out, half);
        } else {
          for (int e = 0; e < 4; ++e)
            if (d + e < rank) to[e] += out[e % 2][2 * half + e / 2];
        }
      }
    }
  }

  // 0 times what is not finite: again, by selection.
  CK_DEVICE void select_finite(float (&out)[2][4], int half, int at, int d) const {
    for (int e = 0; e < 4; ++e) {
      float sum = 0;
#pragma unroll 1
      for (int row = 0; row < 16; ++row) {
        const float value = widen(strip[row * kPitch + at]);
        const T* const numbers = reinterpret_cast<const T*>(rows.at(row, (d + e) / 8));
        if (value != 0.0f) sum += value * widen(numbers[(d + e) % 8]);
      }
      out[e % 2][2 * half + e / 2] = sum;
    }
  }

  CK_DEVICE static void add_four(float* to, const float (&out)[2][4], int half) {
    float4 value;
    value = *reinterpret_cast<const float4*>(to);
    value.x += out[0][2 * half], value.y += out[1][2 * half];
    value.z += out[0][2 * half + 1], value.w += out[1][2 * half + 1];
    *reinterpret_cast<float4*>(to) = value;
  }
};

}  // namespace ck::cuda
