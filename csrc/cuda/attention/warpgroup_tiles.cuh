// Tiles of the kernels for warpgroups in shared memory, as tensor_load lays them: panels of 64 channels, whose rows
// have 128 bytes.
#pragma once

#include "csrc/cuda/attention/scores.cuh"
#include "csrc/cuda/attention/warpgroup_ring.cuh"

namespace ck::cuda {

// Where piece `piece` of 8 channels of row r stands. rows: a multiple of 1024 bytes.
CK_DEVICE char* piece_of_row(char* rows, int panel, int r, int piece) {
  return rows + piece / 8 * panel + r * 128 + ((piece ^ r) % 8) * 16;
}

// Copies rows of head `head` of batch row b, from `row` on, to panels that are `panel` bytes apart.
template <int D>
CK_DEVICE void load_panels(char* to, int panel, const TensorMap& map, int row, int head, int b, uint64_t* full) {
  for (int c = 0; c < D / 64; ++c) tensor_load(to + c * panel, map, 64 * c, row, head, b, full);
}

// Starts acc = 64 rows times kOther others, over D channels. The panels of each are so many bytes apart.
template <class T, int D, int kOther>
CK_DEVICE void start_pairs(float (&acc)[kOther / 8][4], const Operand& own, int own_panel, const Operand& others,
                           int panel) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    wgmma<T, kOther>(acc, own.further(k / 4 * own_panel + k % 4 * 32), others.further(k / 4 * panel + k % 4 * 32),
                     k > 0);
}

// Starts acc += values, of 64 rows and 16 numbers each, times rows of D channels.
template <class T, int D, int kX>
CK_DEVICE void start_rows(float (&acc)[D / 8][4], const uint32_t (&values)[kX][4], const Operand& rows) {
#pragma unroll
  for (int k = 0; k < kX; ++k) wgmma<T, D, Major::kOther>(acc, values[k], rows.further(k * 2048), true);
}

// Rounds the sums of a product to the left factor of another one.
template <class T, int kX>
CK_DEVICE void round_sums(uint32_t (&to)[kX / 2][4], const float (&sums)[kX][4]) {
#pragma unroll
  for (int k = 0; k < kX / 2; ++k)
    for (int e = 0; e < 4; ++e)
      to[k][e] = narrow_pair<T>(sums[2 * k + e / 2][e % 2 * 2], sums[2 * k + e / 2][e % 2 * 2 + 1]);
}

// Rows for multiply_table, from a multiple of 8 rows on: in panels, `panel` bytes apart, or, where `pitch` is not 0, so
// many bytes apart.
struct TileRows {
  char* rows;
  int panel, pitch;

  CK_DEVICE void load_left(uint32_t (&a)[4], int n, int k, int lane) const {
    ldmatrix_x4(a, at(n + lane % 16, k / 8 + lane / 16));
  }
  // The first 16 rows and the channels from k on, as two right factors of 8 columns each.
  CK_DEVICE void load_right(uint32_t (&b)[2][2], int k, int lane) const {
    uint32_t words[4];
    ldmatrix_x4_trans(words, at(lane % 16, k / 8 + lane / 16));
    b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
  }

  CK_DEVICE char* at(int row, int piece) const {
    return pitch == 0 ? piece_of_row(rows, panel, row, piece) : rows + row * pitch + piece * 16;
  }
};

// The same of type T.
template <class T>
struct TypedRows : TileRows {
  CK_DEVICE T number(int row, int channel) const {
    return reinterpret_cast<const T*>(at(row, channel / 8))[channel % 8];
  }
};

// The tiles of kKeys keys whose keys all queries of a tile see.
template <int kKeys>
struct SeenTiles {
  Range firsts;

  CK_DEVICE SeenTiles(const Attention& p, const AttentionTile& tile) {
    const Range first = visible_keys(p, tile, tile.first);
    const Range last = visible_keys(p, tile, tile.first + tile.count - 1);
    firsts = {max(first.first, last.first), min(first.end, last.end) - kKeys + 1};
  }
  CK_DEVICE bool has(int j0, bool real) const { return real && j0 >= firsts.first && j0 < firsts.end; }
};

// What ask_mask says of the keys from j0 on, 32 at a time.
template <int kWords>
CK_DEVICE void ask_masks(unsigned (&asked)[kWords], const Attention& p, int64_t b, int j0, int lane) {
  if (p.key_mask == nullptr) return;
#pragma unroll
  for (int n = 0; n < kWords; ++n) asked[n] = ask_mask(p, b, j0 + 32 * n, lane);
}

// The keys that the mask leaves, from what ask_masks has found.
template <int kWords>
CK_DEVICE void real_keys(unsigned (&real)[kWords], const Attention& p, const unsigned (&asked)[kWords]) {
#pragma unroll
  for (int n = 0; n < kWords; ++n) real[n] = ~0u;
  if (p.key_mask == nullptr) return;
#pragma unroll
  for (int n = 0; n < kWords; ++n) real[n] = __ballot_sync(kAllLanes, asked[n] != 0);
}

// Sums that do not count become 0. Where a condition says so, it remains a branch: to select each of them would take an
// instruction.
template <class N, int kX>
CK_DEVICE void leave_out(N (&sums)[kX][4]) {
#pragma unroll
  for (int x = 0; x < kX; ++x)
    for (int e = 0; e < 4; ++e) sums[x][e] = 0;
  keep_registers(sums);
}

// Whether all bits are there.
template <int kWords>
CK_DEVICE bool all_of(const unsigned (&words)[kWords]) {
  unsigned all = words[0];
#pragma unroll
  for (int n = 1; n < kWords; ++n) all &= words[n];
  return all == ~0u;
}

// Puts zeros in those of a warpgroup's 64 rows that are not there, so that they add nothing to sums over rows. Bit n of
// there(x): whether row x + n is; x: 0 or 32.
template <int D, class There>
CK_DEVICE void clear_absent(const WarpgroupTurn& turn, char* rows, int panel, const There& there) {
  const unsigned which[2] = {there(0), there(32)};
  if ((which[0] & which[1]) == ~0u) return;
  constexpr int kPieces = D / 8;
#pragma unroll 1
  for (int n = threadIdx.x % 128; n < 64 * kPieces; n += 128) {
    const int r = n / kPieces;
    if (((r < 32 ? which[0] : which[1]) >> r % 32 & 1u) == 0)
      *reinterpret_cast<uint4*>(piece_of_row(rows, panel, r, n % kPieces)) = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  turn.meet_own();
}

// Puts zeros in place of what is not finite in kRows rows of a tile, from row `first` on, by a warpgroup. Returns
// whether this thread has found any.
template <class T, int D, int kRows>
CK_DEVICE bool clear_rows(char* rows, int panel, int first) {
  constexpr int kPieces = D / 8;
  bool found = false;
#pragma unroll 1
  for (int n = threadIdx.x % 128; n < kRows * kPieces; n += 128) {
    auto* const at = reinterpret_cast<uint4*>(piece_of_row(rows, panel, first + n / kPieces, n % kPieces));
    const uint4 x = *at;
    const uint4 y = make_uint4(finite_pair<T>(x.x), finite_pair<T>(x.y), finite_pair<T>(x.z), finite_pair<T>(x.w));
    if (x.x == y.x && x.y == y.y && x.z == y.z && x.w == y.w) continue;
    *at = y;
    found = true;
  }
  return found;
}

// Fills a whole strip: with what the queries add at each column, and in front and behind at what they add left and
// right of the window. Then a pair's place in it follows from its column alone. kColumns: see fill_strip.
template <int kColumns, class T>
CK_DEVICE void fill_whole_strip(float (&left)[2], float (&right)[2], const Relative<T>& rel, const TileRows& rows) {
  rel.template fill_strip<Side::kQueries, kColumns>(Range{0, rel.W}, rows);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const row = rel.strip + (rel.lane / 4 + 8 * half) * rel.pitch;
    left[half] = rel.p.clips() ? row[0] : 0.0f;
    right[half] = rel.p.clips() ? row[rel.W - 1] : 0.0f;
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const row = rel.strip + (rel.lane / 4 + 8 * half) * rel.pitch;
    if (rel.lane % 4 == 0) row[-1] = left[half], row[rel.W] = right[half];
  }
  __syncwarp();
}

// Products s of 16 queries and the kKeys keys from j0 on, where all pairs are seen and on one side: see far_scores.
template <class T, int kKeys>
CK_DEVICE ScoreTerms far_tile_scores(float (&s)[kKeys / 8][4], const Relative<T>& rel, bool is_left, int j0,
                                     const float (&left)[2], const float (&right)[2]) {
  ScoreTerms terms = far_scores(rel.t, is_left ? 0 : 1, left, right);
  if (rel.edges != nullptr) {
    const float* const added = rel.edges + (is_left ? 0 : rel.p.keys) + j0 + rel.lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * terms.factor + added[8 * n + e % 2];
    terms.factor = 1;
  }
  return terms;
}

// Everywhere else s becomes scores, of 16 queries from i0 on. real: the keys that the mask leaves. `whole`:
// fill_whole_strip has been called. seen: the pairs that attend, of 32 keys each. kColumns: see fill_strip.
template <class T, int kKeys, int kColumns>
CK_DEVICE ScoreTerms near_tile_scores(float (&s)[kKeys / 8][4], uint32_t (&seen)[kKeys / 32], const Relative<T>& rel,
                                      const AttentionTile& tile, const FarTiles<Side::kQueries, kKeys, 16>& far, int i0,
                                      int j0, const unsigned (&real)[kKeys / 32], const float (&left)[2],
                                      const float (&right)[2], const TileRows& query_rows, const TileRows& key_rows,
                                      bool whole) {
  const Attention& p = rel.p;
  const float factor = rel.t.score_factor;
#pragma unroll
  for (int sub = 0; sub < kKeys / 32; ++sub) {
    float (&part)[4][4] = reinterpret_cast<float (&)[4][4]>(s[4 * sub]);
    const int first_key = j0 + 32 * sub;
    seen[sub] = kEveryPair;
    const bool here = rel.edges == nullptr && real[sub] == ~0u;  // the keys, without terms of their own
    if (far.template has<32>(first_key, here)) {
      const bool is_left = far.template is_left<32>(first_key);
      const float added[2] = {is_left ? left[0] : right[0], is_left ? left[1] : right[1]};
#pragma unroll
      for (int n = 0; n < 4; ++n)
        for (int e = 0; e < 4; ++e) part[n][e] = part[n][e] * factor + added[e / 2];
      continue;
    }
    const PairTile<Side::kQueries, 32> pairs(p, tile, i0, first_key);
    int first = 0;
    if (p.has_columns()) {
      const Range columns = pairs.columns();
      if (!whole) {
        first = columns.first;
        rel.template fill_strip<Side::kQueries, kColumns>(columns, query_rows);
      }
      rel.add_others(pairs, columns, first, TileRows{key_rows.rows + 32 * sub * 128, key_rows.panel, 0});
    }
    if (whole && here && far.template sees<32>(first_key)) {
      const int row = rel.lane / 4, column = pairs.base() + rel.lane % 4 * 2 - row;
      const float* const strip = rel.strip + row * rel.pitch;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        for (int e = 0; e < 4; ++e) {
          const int c = min(max(column + 8 * n + e % 2 - e / 2 * 8, -1), rel.W);
          part[n][e] = part[n][e] * factor + strip[e / 2 * 8 * rel.pitch + c];
        }
      continue;
    }
    seen[sub] = score_pairs(part, rel, pairs, real[sub], left, right, first);
  }
  return {1, {}, -1, 0};
}

// Stores a warp's 16 rows of sums, times their factors: the first `count` of them, and `channels` channels, where 16
// bytes can be stored at once. They go through `stage`, [16] rows of 64 channels, laid like a tile.
template <class T, int D>
CK_DEVICE void store_rows(T* to, int64_t stride, int count, int channels, const float (&sums)[D / 8][4],
                          const float (&factor)[2], char* stage, int lane) {
  const int row = lane / 8, piece = lane % 8;  // that this lane stores
  T* const first = to + row * stride + piece * 8;
#pragma unroll
  for (int c0 = 0; c0 < D; c0 += 64) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float (&value)[4] = sums[c0 / 8 + c];
      char* const at = piece_of_row(stage, 0, lane / 4, c) + lane % 4 * 4;
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(at + half * 8 * 128) =
            narrow_pair<T>(value[2 * half] * factor[half], value[2 * half + 1] * factor[half]);
    }
    __syncwarp();
    if (c0 + piece * 8 < channels) {
#pragma unroll
      for (int r = 0; r < 16; r += 4)
        if (row + r < count)
          *reinterpret_cast<uint4*>(first + r * stride + c0) =
              *reinterpret_cast<const uint4*>(piece_of_row(stage, 0, row + r, piece));
    }
  }
  __syncwarp();
}

// store(row, channel, value) for each 8 channels of a warp's 16 rows of sums, times their factors; where a factor is 0,
// the values are. They go through `stage`, [16][32] floats, 32 channels at a time.
template <int D, class Store>
CK_DEVICE void each_row(const float (&sums)[D / 8][4], const float (&factor)[2], float* stage, int lane,
                        const Store& store) {
  // Where 4 channels of a row stand: in other banks than those of the rows that are written, or read, at once.
  const auto place = [&](int row, int four) { return stage + row * 32 + (four ^ (row % 4 * 2) ^ (row & 1)) * 4; };
#pragma unroll
  for (int c0 = 0; c0 < D; c0 += 32) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 4; ++c)
      for (int half = 0; half < 2; ++half) {
        const float (&value)[4] = sums[c0 / 8 + c];
        const float f = factor[half];
        *reinterpret_cast<float2*>(place(lane / 4 + 8 * half, 2 * c + lane % 4 / 2) + lane % 2 * 2) =
            make_float2(f == 0.0f ? 0.0f : value[2 * half] * f, f == 0.0f ? 0.0f : value[2 * half + 1] * f);
      }
    __syncwarp();
#pragma unroll 1
    for (int v = lane; v < 16 * 4; v += 32) {
      float value[8];
      for (int n = 0; n < 2; ++n) {
        const float4 four = *reinterpret_cast<const float4*>(place(v / 4, v % 4 * 2 + n));
        value[4 * n] = four.x, value[4 * n + 1] = four.y, value[4 * n + 2] = four.z, value[4 * n + 3] = four.w;
      }
      store(v / 4, c0 + v % 4 * 8, value);
    }
  }
  __syncwarp();
}

}  // namespace ck::cuda
