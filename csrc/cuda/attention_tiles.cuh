// What the tensor-core kernels of attention share: tables as matrices, tiles in shared memory, fragments of scores.
//
// A warp has 16 queries, or a few times 16, and walks over tiles of keys. Scores are kept times log2(e). Only fragments
// of 16 queries and 8 keys that meet the window look at its columns: a strip of shared memory holds what all relative
// terms add to each of 16 queries at each column that the tile of keys reaches. Everywhere else the terms are one
// number per query, which goes into the constant of the exponential, and one per key.
#pragma once

#include "attention.cuh"
#include "attention_config.h"

namespace ck::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Writes the tables in the form the kernels read, see TensorTables. A thread per element and pass.
template <class T>
CK_GLOBAL(kTensorThreads, 2)
void attention_tables(const CK_PARAM Attention p, const CK_PARAM TensorTables t) {
  const int64_t W = p.window(), step = int64_t{gridDim.x} * kTensorThreads;
  const int64_t begin = int64_t{blockIdx.x} * kTensorThreads + threadIdx.x;
  // [heads][terms][window][pitch]
  const auto split = [&](const HeadTable& from, void* to, int64_t terms, int64_t rows, int64_t pitch, bool reverse) {
    if (from.data == nullptr) return;
    for (int64_t e = begin; e < (from.per_head ? p.heads : 1) * W * pitch; e += step) {
      const int64_t d = e % pitch, c = e / pitch % W, h = e / pitch / W;
      float value = d < rows ? table_at<float>(from, h, d, reverse ? W - 1 - c : c) : 0;
      for (int64_t term = 0; term < terms; ++term) {
        const T rounded = narrow<T>(value);
        static_cast<T*>(to)[((h * terms + term) * W + c) * pitch + d] = rounded;
        value -= widen(rounded);
      }
    }
  };
  split(p.query_rel, t.query_rel, t.query_terms, p.rank, t.rank_pitch, false);
  split(p.key_rel, t.key_rel, t.key_terms, p.channels, t.channel_pitch, true);
  if (t.bias != nullptr)
    for (int64_t e = begin; e < p.heads * W; e += step)
      t.bias[e] = table_at<float>(p.bias, e / W, 0, e % W) * kLog2e;
  if (t.taps != nullptr)
    for (int64_t e = begin; e < p.heads * W * t.channel_pitch; e += step) {
      const int64_t d = e % t.channel_pitch, c = e / t.channel_pitch % W, h = e / t.channel_pitch / W;
      t.taps[e] = d < p.channels ? table_at<float>(p.value_conv, h, d, c) * tap_scale<float>(p, h) : 0;
    }
}

// key_edges [batch, heads, 2, keys]: what key_rel adds left and right of the window, times log2(e). A warp per key.
template <class T>
CK_GLOBAL(kTensorThreads, 2)
void attention_key_edges(const CK_PARAM Attention p, const CK_PARAM TensorTables t) {
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t{blockIdx.x} * (kTensorThreads / 32) + threadIdx.x / 32;
  if (n >= p.batch * p.heads * p.keys) return;
  const int64_t j = n % p.keys, unit = n / p.keys, b = unit / p.heads, h = unit % p.heads;
  float left = 0, right = 0;
  if (real_key(p, b, j))
    for (int64_t d = lane; d < p.channels; d += 32) {
      const float k = widen(at<T>(p.k, b, j, h / p.sharing())[d * p.k.channel]);
      left += k * table_at<float>(p.key_rel, h, d, p.window() - 1);
      right += k * table_at<float>(p.key_rel, h, d, 0);
    }
  left = warp_sum(left);
  right = warp_sum(right);
  const float factor = static_cast<float>(p.scale) * kLog2e;
  if (lane == 0) {
    t.key_edges[unit * 2 * p.keys + j] = left * factor;
    t.key_edges[(unit * 2 + 1) * p.keys + j] = right * factor;
  }
}

// Copies `rows` rows of head h from position `first` on to shared memory, `kChannels` channels each, by all threads.
// Zeros stand where there is no row or channel, and for padded keys (`masked`).
template <class T>
CK_DEVICE void copy_tile(T* to, int pitch, const Attention& p, const HeadRows& t, int64_t b, int64_t h, int first,
                         int rows, int begin, int end, int channels, int padded, bool masked, bool vectors) {
  const int per_row = padded / 8;
  const T* const source = at<T>(t, b, 0, h);
  for (int v = threadIdx.x; v < rows * per_row; v += kTensorThreads) {
    const int row = v / per_row, c = v % per_row * 8, j = first + row;
    const bool valid = j >= begin && j < end && c < channels && (!masked || real_key(p, b, j));
    T* const out = to + row * pitch + c;
    const T* const from = valid ? source + j * t.time : static_cast<const T*>(t.data);
    if (vectors) {
      cp_async<16>(out, valid ? from + c : from, valid);
    } else {
      for (int e = 0; e < 8; ++e) out[e] = valid && c + e < channels ? from[(c + e) * t.channel] : T{0};
    }
  }
}

// The 16 x 16 matrix at `tile`, as the left factor of a product.
template <class T>
CK_DEVICE void load_left(uint32_t (&a)[4], const T* tile, int pitch, int lane) {
  ldmatrix_x4(a, tile + lane % 16 * pitch + lane / 16 * 8);
}
// The transpose of the 16 x 16 matrix at `tile`, as the left factor.
template <class T>
CK_DEVICE void load_left_transposed(uint32_t (&a)[4], const T* tile, int pitch, int lane) {
  ldmatrix_x4_trans(a, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}
// 16 rows of 16 numbers at `tile` as two right factors whose columns are these rows.
template <class T>
CK_DEVICE void load_right_rows(uint32_t (&b)[2][2], const T* tile, int pitch, int lane) {
  uint32_t words[4];
  ldmatrix_x4(words, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
  b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
}
// The 16 x 16 matrix at `tile` as two right factors of 8 columns each.
template <class T>
CK_DEVICE void load_right(uint32_t (&b)[2][2], const T* tile, int pitch, int lane) {
  uint32_t words[4];
  ldmatrix_x4_trans(words, tile + lane % 16 * pitch + lane / 16 * 8);
  b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
}

// out += the 16 rows at `rows` (shared memory) times columns of a table [terms][window][pitch] (global memory), which
// lane / 4 says: `column`.
template <class T>
CK_DEVICE void multiply_table(float (&out)[4], const T* rows, int row_pitch, const void* table, int64_t terms, int64_t W,
                              int64_t pitch, int column, int lane) {
  const T* const first = static_cast<const T*>(table) + column * pitch + lane % 4 * 2;
#pragma unroll 1
  for (int k = 0; k < pitch; k += 16) {
    uint32_t a[4];
    load_left(a, rows + k, row_pitch, lane);
#pragma unroll 1
    for (int64_t term = 0; term < terms; ++term) {
      const T* const from = first + term * W * pitch + k;
      const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(from), *reinterpret_cast<const uint32_t*>(from + 8)};
      mma_m16n8k16<T>(out, a, b);
    }
  }
}

// Which of 64 keys from `first` on the mask leaves, as bits; by a warp.
struct RealKeys {
  unsigned low = ~0u, high = ~0u;

  CK_DEVICE RealKeys(const Attention& p, int64_t b, int first, int lane) {
    if (p.key_mask == nullptr) return;
    const auto real = [&](int j) { return j >= 0 && j < p.keys && real_key(p, b, j); };
    low = __ballot_sync(kEveryLane, real(first + lane));
    high = __ballot_sync(kEveryLane, real(first + 32 + lane));
  }
  CK_DEVICE bool all(int keys) const { return low == ~0u && (keys <= 32 || high == ~0u); }
  CK_DEVICE bool of(int n) const { return ((n < 32 ? low : high) >> (n & 31) & 1u) != 0; }
};

// Everything that relative terms need to know of a call and a head.
template <class T>
struct Relative {
  const Attention& p;
  const TensorTables& t;
  const int64_t b, h;
  const T *query_rel, *key_rel;        // of this head
  const float *bias, *edges;           // of this head; edges: left ones, then right ones
  int W, lane;
  float rel_factor, factor;  // of products, with log2(e)

  CK_DEVICE Relative(const Attention& p, const TensorTables& t, int64_t b, int64_t h, int lane)
      : p(p),
        t(t),
        b(b),
        h(h),
        query_rel(static_cast<const T*>(t.query_rel) +
                  (p.query_rel.per_head ? h * t.query_terms * p.window() * t.rank_pitch : 0)),
        key_rel(static_cast<const T*>(t.key_rel) +
                (p.key_rel.per_head ? h * t.key_terms * p.window() * t.channel_pitch : 0)),
        bias(t.bias == nullptr ? nullptr : t.bias + h * p.window()),
        edges(t.key_edges == nullptr ? nullptr : t.key_edges + (b * p.heads + h) * 2 * p.keys),
        W(static_cast<int>(p.window())),
        lane(lane),
        rel_factor(static_cast<float>(p.rel_scale) * kLog2e),
        factor(static_cast<float>(p.scale) * kLog2e) {}

  // What the query's terms add left and right of the window: to rows lane / 4 and lane / 4 + 8 of 16. rows: of
  // relative_rows(), in shared memory.
  CK_DEVICE void query_edges(float (&left)[2], float (&right)[2], const T* rows, int pitch) const {
    left[0] = left[1] = right[0] = right[1] = 0;
    if (!p.clips() || !p.has_query_columns()) return;
    float out[4] = {};
    if (p.query_rel.data != nullptr)
      multiply_table(out, rows, pitch, query_rel, t.query_terms, W, t.rank_pitch, lane / 4 == 0 ? 0 : W - 1, lane);
    for (int e = 0; e < 4; ++e) out[e] = __shfl_sync(kEveryLane, out[e], lane & ~3) * rel_factor;
    for (int half = 0; half < 2; ++half) {
      left[half] = out[2 * half] + (bias == nullptr ? 0.0f : bias[0]);
      right[half] = out[2 * half + 1] + (bias == nullptr ? 0.0f : bias[W - 1]);
    }
  }

  // Fills the strip of 16 queries from i0 on (place of i0: `place`) for the keys from j0 to before j0 + keys: what the
  // terms add at columns `first` .. `end` - 1. query_rows, key_rows: in shared memory, key_rows from j0 on.
  CK_DEVICE void fill_strip(float* strip, int pitch, int place, int j0, int keys, int first, int end,
                            const T* query_rows, int query_pitch, const T* key_rows, int key_pitch) const {
    const int row = lane / 4, pair = lane % 4 * 2;
    __syncwarp();
#pragma unroll 1
    for (int c = first; c < end; c += 8) {
      float out[4] = {};
      if (p.query_rel.data != nullptr)
        multiply_table(out, query_rows, query_pitch, query_rel, t.query_terms, W, t.rank_pitch,
                       least(c + row, W - 1), lane);
      for (int e = 0; e < 4; ++e) {
        const int column = c + pair + e % 2;
        const float added = bias == nullptr || column >= W ? 0.0f : bias[column];
        strip[(row + e / 2 * 8) * pitch + column - first] = out[e] * rel_factor + added;
      }
    }
    __syncwarp();
    if (p.key_rel.data == nullptr) return;
    const int left = static_cast<int>(p.left);
#pragma unroll 1
    for (int n = 0; n < keys; n += 16) {
      // Key j0 + n + m and column c belong to query row j0 + n + m - c + left - place.
      const int base = j0 + n + left - place;
#pragma unroll 1
      for (int c = first; c < end; c += 8) {
        if (base + 15 - c < 0 || base - (c + 7) > 15) continue;
        float out[4] = {};
        multiply_table(out, key_rows + n * key_pitch, key_pitch, key_rel, t.key_terms, W, t.channel_pitch,
                       least(c + row, W - 1), lane);
        for (int e = 0; e < 4; ++e) {
          const int column = c + pair + e % 2, query = base + row + e / 2 * 8 - column;
          if (query >= 0 && query < 16 && column < end) strip[query * pitch + column - first] += out[e] * factor;
        }
      }
    }
    __syncwarp();
  }
};

// Turns raw products of 16 queries from i0 on and kKeys keys from j0 on into scores times log2(e), in place; pairs that
// do not attend get -inf. rows: the number of queries.
template <class T, int kKeys>
CK_DEVICE void finish_scores(float (&s)[kKeys / 8][4], const Relative<T>& rel, const AttentionTile& tile, int i0, int j0,
                             const RealKeys& real, const float (&left)[2], const float (&right)[2], const float* strip,
                             int pitch, int strip_first) {
  const Attention& p = rel.p;
  const int row = rel.lane / 4, pair = rel.lane % 4 * 2, W = rel.W;
  const bool columns = p.has_columns();
  Span keys[2];
  for (int half = 0; half < 2; ++half) keys[half] = visible_keys(p, tile, i0 + row + 8 * half);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const int base = tap_of_pair(p, tile, i0, j0 + 8 * n);
    const bool all_left = base + 7 < 0, all_right = base - 15 >= W;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, col = pair + e % 2, j = j0 + 8 * n + col, r = row + 8 * half;
      float value = s[n][e] * rel.factor;
      if (columns) {
        if (all_left) {
          value += left[half];
        } else if (all_right) {
          value += right[half];
        } else {
          const int c = base + col - r;
          value += c < 0 ? left[half] : c >= W ? right[half] : strip[r * pitch + c - strip_first];
        }
        if (rel.edges != nullptr && j >= 0 && j < p.keys) {
          const int c = base + col - r;
          if (c < 0) value += rel.edges[j];
          if (c >= W) value += rel.edges[p.keys + j];
        }
      }
      const bool sees = j >= keys[half].first && j < keys[half].end && real.of(8 * n + col);
      s[n][e] = sees ? value : -infinity<float>();
    }
  }
}

// Whether the keys j0 .. j0 + keys - 1 are all seen by all 16 queries from i0 on, and lie left, or right, of all their
// windows (or there is nothing to add).
struct FarTile {
  bool seen, left, right;

  CK_DEVICE FarTile(const Attention& p, const AttentionTile& tile, int i0, int j0, int keys, const RealKeys& real) {
    const int last = least(i0 + 15, tile.query_end - 1);
    const Span first = visible_keys(p, tile, i0), end = visible_keys(p, tile, last);
    seen = j0 >= end.first && j0 + keys <= first.end && real.all(keys);
    left = tap_of_pair(p, tile, i0, j0 + keys - 1) < 0;
    right = tap_of_pair(p, tile, i0 + 15, j0) >= p.window();
  }
  CK_DEVICE bool plain(const Attention& p) const {
    return seen && (!p.has_columns() || left || right) && (p.key_rel.data == nullptr || !p.clips());
  }
};

// Sets the weights of what dropout drops to 0, in a fragment of 16 queries from i0 on and 8 keys from j0 on, a multiple
// of 4. Each lane draws for one of its two rows, the other lane of its pair for the other.
CK_DEVICE void drop(float (&w)[4], const Attention& p, uint64_t seed, int64_t b, int64_t h, int i0, int j0, int lane) {
  const bool odd = (lane & 1) != 0;
  const PhiloxBlock words =
      pair_words(seed, b, h, i0 + lane / 4 + (odd ? 8 : 0), j0 / 4 + (lane % 4) / 2);
  // The even lane has the first two keys of the four, in both rows.
  const uint32_t low = __shfl_xor_sync(kEveryLane, odd ? words.word[0] : words.word[2], 1);
  const uint32_t high = __shfl_xor_sync(kEveryLane, odd ? words.word[1] : words.word[3], 1);
  const uint32_t mine[4] = {odd ? low : words.word[0], odd ? high : words.word[1], odd ? words.word[2] : low,
                            odd ? words.word[3] : high};
  for (int e = 0; e < 4; ++e)
    if (mine[e] < p.drop_below) w[e] = 0;
}

}  // namespace ck::cuda
