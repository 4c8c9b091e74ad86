// What the tensor-core kernels of attention share: tables as matrices, tiles in shared memory, fragments of scores.
//
// What is hidden contributes nothing, even if it holds NaN or infinity. Scores and their gradients are selected, in
// tiles where not every pair is seen. A product of such a tile with rows that are not finite spoils sums of pairs that
// are not seen, which shows when the sums are finished: then the walk over the tiles is made again, with zeros in place
// of those numbers (multiply_rows), and they are added at the end, pair by pair (add_spoiled).
//
// A warp has 16 queries, or a few times 16, and walks over tiles of keys. Scores are kept times log2(e). Only fragments
// of 16 queries and 8 keys that meet the window look at its columns: a strip of shared memory holds what all relative
// terms add to each of 16 queries at each column that the tile of keys reaches. Everywhere else the terms are one
// number per query, which goes into the constant of the exponential, and one per key.
#pragma once

#include "csrc/cuda/attention/common.cuh"
#include "csrc/cuda/attention/plan.h"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

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
    for (int64_t e = begin; e < p.heads * W; e += step) t.bias[e] = table_at<float>(p.bias, e / W, 0, e % W) * kLog2e;
  if (t.taps != nullptr)
    for (int64_t e = begin; e < p.heads * W * t.channel_pitch; e += step) {
      const int64_t d = e % t.channel_pitch, c = e / t.channel_pitch % W, h = e / t.channel_pitch / W;
      t.taps[e] = d < p.channels ? table_at<float>(p.value_conv, h, d, c) * tap_scale<float>(p, h) : 0;
    }
}

// key_edges, or query_edges [batch, heads, 2, positions]: what the relative terms of each key, or query, add left and
// right of the window, times log2(e). A warp per position.
template <class T>
CK_GLOBAL(kTensorThreads, 2)
void attention_edges(const CK_PARAM Attention p, float* edges, bool keys) {
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t{blockIdx.x} * (kTensorThreads / 32) + threadIdx.x / 32;
  const int64_t positions = keys ? p.keys : p.queries, W = p.window();
  if (n >= p.batch * p.heads * positions) return;
  const int64_t i = n % positions, unit = n / positions, b = unit / p.heads, h = unit % p.heads;
  const HeadTable& table = keys ? p.key_rel : p.query_rel;
  const HeadRows& rows = keys ? p.k : relative_rows(p);
  float left = 0, right = 0;
  if (table.data != nullptr && (!keys || real_key(p, b, i)))
    for (int64_t d = lane; d < (keys ? p.channels : p.rank); d += 32) {
      const float x = widen(at<T>(rows, b, i, keys ? h / p.sharing() : h)[d * rows.channel]);
      left += x * table_at<float>(table, h, d, keys ? W - 1 : 0);
      right += x * table_at<float>(table, h, d, keys ? 0 : W - 1);
    }
  const float factor = static_cast<float>(keys ? p.scale : p.rel_scale);
  left = lane_sum(left) * factor;
  right = lane_sum(right) * factor;
  if (!keys && p.bias.data != nullptr) {
    left += table_at<float>(p.bias, h, 0, 0);
    right += table_at<float>(p.bias, h, 0, W - 1);
  }
  if (lane == 0) {
    edges[unit * 2 * positions + i] = left * kLog2e;
    edges[(unit * 2 + 1) * positions + i] = right * kLog2e;
  }
}

// Bit n: whether position first + n is in the span.
CK_DEVICE unsigned those_in(const Span& span, int first) {
  const auto from = [&](int position) { return __funnelshift_lc(0, ~0u, max(position - first, 0)); };
  return from(span.first) & ~from(span.end);
}

static_assert(kForwardKeys == 32 && kGradOthers == 32);  // bits of a word

// Copies the 32 rows of head h from position `first` on to shared memory, `padded` channels each, by all threads. Zeros
// stand where `there` has no bit for a row, and where there is no channel. The pitch is 8 channels more than there is
// room for.
template <class T>
CK_DEVICE void copy_rows(T* to, int pitch, const HeadRows& t, int64_t b, int64_t h, int first, unsigned there,
                         int channels, int padded, bool vectors) {
  // A thread has the same 8 channels of all its rows. As many threads as a power of two share a row, some of which may
  // have nothing to do: a division would take longer.
  const int log = pitch > 72 ? 4 : pitch > 40 ? 3 : 2, step = kTensorThreads >> log, row = threadIdx.x >> log;
  const int c = (threadIdx.x & ((1 << log) - 1)) * 8;
  if (c >= padded) return;
  const unsigned valid = c < channels ? there >> row : 0;
  const T* from = at<T>(t, b, 0, h) + int64_t{first + row} * t.time;
  const int64_t stride = step * t.time;
  T* out = to + row * pitch + c;
  if (vectors) {
    from += c;
#pragma unroll 4
    for (int r = 0; r < 32; r += step, from += stride, out += step * pitch)
      cp_async<16>(out, from, (valid >> r & 1u) != 0);
  } else {
#pragma unroll 1
    for (int r = 0; r < 32; r += step, from += stride, out += step * pitch)
      for (int e = 0; e < 8; ++e)
        out[e] = (valid >> r & 1u) != 0 && c + e < channels ? from[(c + e) * t.channel] : T{0};
  }
}

// The same for kRows rows, of which those of `span` are there.
template <int kRows, class T>
CK_DEVICE void copy_tile(T* to, int pitch, const HeadRows& t, int64_t b, int64_t h, int first, const Span& span,
                         int channels, int padded, bool vectors) {
#pragma unroll 1
  for (int r = 0; r < kRows; r += 32)
    copy_rows(to + r * pitch, pitch, t, b, h, first + r, those_in(span, first + r), channels, padded, vectors);
}

// step(0) to step(kSteps - 1) for D channels in equal pieces; the last 32 channels may be padding, and take part only
// if `all`.
template <int D, int kSteps, class Step>
CK_DEVICE void each_piece(bool all, const Step& step) {
  constexpr int kSure = kSteps - kSteps * 32 / D;
#pragma unroll
  for (int k = 0; k < kSure; ++k) step(k);
  if (!all) return;
#pragma unroll
  for (int k = kSure; k < kSteps; ++k) step(k);
}

// 8 channels of a row, zeros beyond `count`.
template <class T>
CK_DEVICE void load_channels(float (&value)[8], const T* from, int64_t stride, int count, bool vectors) {
  if (vectors) {
    unpack_vector(value, from);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = e < count ? widen(from[e * stride]) : 0.0f;
  }
}

// Writes them.
template <class T>
CK_DEVICE void store_channels(T* to, int64_t stride, int count, bool vectors, const float (&value)[8]) {
  if (vectors) {
    uint32_t words[4];
    pack<T>(words, value);
    store_vector(to, words);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) to[e * stride] = narrow<T>(value[e]);
  }
}

// The 16 x 16 matrix at `tile`, as the left factor of a product.
template <class T>
CK_DEVICE void load_left(uint32_t (&a)[4], const T* tile, int pitch, int lane) {
  ldmatrix_x4(a, tile + lane % 16 * pitch + lane / 16 * 8);
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

// Two numbers in one word, zeros in place of those that are not finite.
template <class T>
CK_DEVICE uint32_t finite_pair(uint32_t pair) {
  constexpr uint32_t kLow = std::is_same_v<T, bf16> ? 0x7F80u : 0x7C00u, kHigh = kLow << 16;
  return ((pair & kLow) == kLow ? 0u : pair & 0xFFFFu) | ((pair & kHigh) == kHigh ? 0u : pair & 0xFFFF0000u);
}

// acc[m] += the matrix values[m] of 16 rows, rounded to T, times the rows at `rows`, [8 kX][channels]. kFinite: with
// zeros in place of what is not finite in them.
template <class T, bool kFinite, int kM, int kC, int kX>
CK_DEVICE void multiply_rows(float (&acc)[kM][kC][4], const float (&values)[kM][kX][4], const T* rows, int pitch,
                             bool all, int lane) {
#pragma unroll
  for (int k = 0; k < kX / 2; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
      for (int e = 0; e < 4; ++e)
        a[m][e] = narrow_pair<T>(values[m][2 * k + e / 2][e % 2 * 2], values[m][2 * k + e / 2][e % 2 * 2 + 1]);
    each_piece<8 * kC, kC / 2>(all, [&](int c) {
      uint32_t b[2][2];
      load_right(b, rows + 16 * k * pitch + 16 * c, pitch, lane);
      if constexpr (kFinite)
        for (int n = 0; n < 4; ++n) b[n / 2][n % 2] = finite_pair<T>(b[n / 2][n % 2]);
#pragma unroll
      for (int m = 0; m < kM; ++m)
        for (int y = 0; y < 2; ++y) mma_m16n8k16<T>(acc[m][2 * c + y], a[m], b[y]);
    });
  }
}

template <class T, int kM, int kC, int kX>
CK_DEVICE void multiply_rows(float (&acc)[kM][kC][4], const float (&values)[kM][kX][4], const T* rows, int pitch,
                             bool all, int lane, bool finite) {
  if (finite)
    multiply_rows<T, true>(acc, values, rows, pitch, all, lane);
  else
    multiply_rows<T, false>(acc, values, rows, pitch, all, lane);
}

template <class T, int kC, int kX>
CK_DEVICE void multiply_rows(float (&acc)[kC][4], const float (&values)[kX][4], const T* rows, int pitch, bool all,
                             int lane, bool finite) {
  multiply_rows<T>(reinterpret_cast<float (&)[1][kC][4]>(acc), reinterpret_cast<const float (&)[1][kX][4]>(values),
                   rows, pitch, all, lane, finite);
}

// Whether some sum is not finite.
template <int kC>
CK_DEVICE bool spoiled(const float (&acc)[kC][4]) {
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kC; ++c)
    for (int e = 0; e < 4; ++e) sum += acc[c][e] * 0.0f;
  return !is_finite(sum);
}

// Adds to 8 channels of a result, d and following ones, what is not finite in the rows of its partners.
template <class T, class Seen>
CK_DEVICE void add_spoiled(float (&value)[8], const HeadRows& t, int64_t b, int64_t h, Span partners, int d, int count,
                           bool vectors, const Seen& seen) {
#pragma unroll 1
  for (int j = partners.first; j < partners.end; ++j) {
    if (!seen(j)) continue;
    float x[8];
    load_channels(x, at<T>(t, b, j, h) + d * t.channel, t.channel, count, vectors);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += is_finite(x[e]) ? 0.0f : x[e];
  }
}

// out += the 16 rows at `rows` (shared memory) times columns of a table [terms][window][pitch] (global memory), which
// lane / 4 says: `column`.
template <class T>
CK_DEVICE void multiply_table(float (&out)[4], const T* rows, int row_pitch, const void* table, int64_t terms,
                              int64_t W, int64_t pitch, int column, int lane) {
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

// Which of the keys first .. first + 31 the mask leaves, by a warp: what it says of this lane's key, and all as bits.
// Asked for a tile ahead, it has been read when the tile's turn comes.
CK_DEVICE unsigned ask_mask(const Attention& p, int64_t b, int first, int lane) {
  if (p.key_mask == nullptr) return 1;
  const int j = first + lane;
  if (j < 0 || j >= p.keys) return 0;
  return reinterpret_cast<const uint8_t*>(p.key_mask)[b * p.mask_batch + j * p.mask_key];
}
CK_DEVICE unsigned real_keys(const Attention& p, unsigned asked) {
  return p.key_mask == nullptr ? ~0u : __ballot_sync(kAllLanes, asked != 0);
}

// A side of the pairs: 16 queries that meet other keys, or 16 keys that meet other queries.
enum class Own { kQueries, kKeys };

// A warp's 16 own positions and the others it meets at a time.
template <Own kOwn, int kOther>
struct Meeting {
  int own, other;  // the first of each
  int first_query, first_key;

  CK_DEVICE Meeting(int own, int other)
      : own(own),
        other(other),
        first_query(kOwn == Own::kQueries ? own : other),
        first_key(kOwn == Own::kQueries ? other : own) {}

  static constexpr int kQueries = kOwn == Own::kQueries ? 16 : kOther, kKeys = kOwn == Own::kQueries ? kOther : 16;

  // The columns that any pair has lie from lowest to highest.
  CK_DEVICE int lowest(const Attention& p, const AttentionTile& tile) const {
    return tap_of_pair(p, tile, first_query + kQueries - 1, first_key);
  }
  CK_DEVICE int highest(const Attention& p, const AttentionTile& tile) const {
    return tap_of_pair(p, tile, first_query, first_key + kKeys - 1);
  }
  // Of those, the ones that tables have.
  CK_DEVICE Span columns(const Attention& p, const AttentionTile& tile) const {
    return {max(0, lowest(p, tile)), min(static_cast<int>(p.window()), highest(p, tile) + 1)};
  }
  // The others that an own position attends to, or that attend to it.
  static CK_DEVICE Span partners(const Attention& p, const AttentionTile& tile, int position) {
    if constexpr (kOwn == Own::kQueries) return visible_keys(p, tile, position);
    const Span none{0, 0};
    return position >= tile.key_begin && position < tile.key_end ? seeing_queries(p, tile, position, position + 1)
                                                                 : none;
  }
  // Whether all pairs attend and lie on one side of the window, if there is one. `real`: of the keys.
  CK_DEVICE bool far(const Attention& p, const AttentionTile& tile, unsigned real) const {
    const Span first = partners(p, tile, own);
    const Span last = partners(p, tile, kOwn == Own::kQueries ? min(own + 15, tile.query_end - 1) : own + 15);
    constexpr unsigned kAll = kKeys == 32 ? ~0u : (1u << kKeys % 32) - 1;
    const bool seen = other >= max(first.first, last.first) && other + kOther <= min(first.end, last.end);
    return seen && (real & kAll) == kAll && (!p.has_columns() || is_left(p, tile) || lowest(p, tile) >= p.window());
  }
  CK_DEVICE bool is_left(const Attention& p, const AttentionTile& tile) const { return highest(p, tile) < 0; }
};

// Meeting::far for all tiles of others that kRows own positions meet, found once: others from one of two spans on.
template <Own kOwn, int kOther, int kRows>
struct FarTiles {
  Span left, right;

  CK_DEVICE FarTiles(const Attention& p, const AttentionTile& tile, int own) {
    using Pairs = Meeting<kOwn, kOther>;
    constexpr bool kQueries = kOwn == Own::kQueries;
    const Span first = Pairs::partners(p, tile, own);
    const Span last = Pairs::partners(p, tile, kQueries ? min(own + kRows, tile.query_end) - 1 : own + kRows - 1);
    left = {max(first.first, last.first), min(first.end, last.end) - kOther + 1};
    right = left;
    if (!p.has_columns()) return;
    const int W = static_cast<int>(p.window());
    // The position that the first own one meets at column 0.
    const int zero =
        kQueries ? own + tile.shift - static_cast<int>(p.left) : own - tile.shift + static_cast<int>(p.left);
    if constexpr (kQueries) {
      left.end = min(left.end, zero - kOther + 1);
      right.first = max(right.first, zero + kRows - 1 + W);
    } else {
      left.first = max(left.first, zero + kRows);
      right.end = min(right.end, zero - W - kOther + 2);
    }
  }

  // `real`: of the keys, all of which have to be.
  CK_DEVICE bool has(int other, bool real) const {
    return real && ((other >= left.first && other < left.end) || (other >= right.first && other < right.end));
  }
};

// Everything that relative terms need to know of a call and a head.
template <class T>
struct Relative {
  const Attention& p;
  const TensorTables& t;
  int h, W, lane;

  CK_DEVICE Relative(const Attention& p, const TensorTables& t, int64_t h, int lane)
      : p(p), t(t), h(static_cast<int>(h)), W(static_cast<int>(p.window())), lane(lane) {}

  // The tables of this head, found anew where they are needed.
  CK_DEVICE const T* query_rel() const {
    return static_cast<const T*>(t.query_rel) +
           (p.query_rel.per_head ? opaque(h) * t.query_terms * p.window() * t.rank_pitch : 0);
  }
  CK_DEVICE const T* key_rel() const {
    return static_cast<const T*>(t.key_rel) +
           (p.key_rel.per_head ? opaque(h) * t.key_terms * p.window() * t.channel_pitch : 0);
  }
  CK_DEVICE const float* bias() const { return t.bias == nullptr ? nullptr : t.bias + opaque(h) * p.window(); }

  // What the query's terms add left and right of the window: to rows lane / 4 and lane / 4 + 8 of 16. rows: of
  // relative_rows(), in shared memory.
  CK_DEVICE void query_edges(float (&left)[2], float (&right)[2], const T* rows, int pitch) const {
    left[0] = left[1] = right[0] = right[1] = 0;
    if (!p.clips() || !p.has_query_columns()) return;
    float out[4] = {};
    if (p.query_rel.data != nullptr)
      multiply_table(out, rows, pitch, query_rel(), t.query_terms, W, t.rank_pitch, lane / 4 == 0 ? 0 : W - 1, lane);
    for (int e = 0; e < 4; ++e) out[e] = __shfl_sync(kAllLanes, out[e], lane & ~3) * t.rel_factor;
    const float* const bias = this->bias();
    for (int half = 0; half < 2; ++half) {
      left[half] = out[2 * half] + (bias == nullptr ? 0.0f : bias[0]);
      right[half] = out[2 * half + 1] + (bias == nullptr ? 0.0f : bias[W - 1]);
    }
  }

  // Fills the strip of 16 own positions: what all terms add at the `columns` of each. The rows lie in shared memory,
  // each from the first one of the meeting on.
  template <Own kOwn, int kOther>
  CK_DEVICE void fill_strip(float* strip, int pitch, const Meeting<kOwn, kOther>& pairs, const AttentionTile& tile,
                            Span columns, const T* query_rows, int query_pitch, const T* key_rows,
                            int key_pitch) const {
    constexpr bool kQueries = kOwn == Own::kQueries;
    const int lane = opaque(this->lane), row = lane / 4, pair = lane % 4 * 2;
    const float* const bias = this->bias();
    // out += 16 rows, n from the first on, times the columns from c on.
    const auto multiply = [&](float (&out)[4], bool queries, int n, int c) {
      const int column = min(c + row, W - 1);
      if (queries && p.query_rel.data != nullptr)
        multiply_table(out, query_rows + n * query_pitch, query_pitch, query_rel(), t.query_terms, W, t.rank_pitch,
                       column, lane);
      if (!queries && p.key_rel.data != nullptr)
        multiply_table(out, key_rows + n * key_pitch, key_pitch, key_rel(), t.key_terms, W, t.channel_pitch, column,
                       lane);
    };
    __syncwarp();
#pragma unroll 1
    for (int c = columns.first; c < columns.end; c += 8) {
      float out[4] = {};
      multiply(out, kQueries, 0, c);
      for (int e = 0; e < 4; ++e) {
        const int column = c + pair + e % 2;
        const float added = bias == nullptr || column >= W ? 0.0f : bias[column];
        strip[(row + e / 2 * 8) * pitch + column - columns.first] =
            out[e] * (kQueries ? t.rel_factor : t.score_factor) + added;
      }
    }
    __syncwarp();
    if ((kQueries ? p.key_rel : p.query_rel).data == nullptr) return;
    // Own position r and the other m have column base + m - r, or base + r - m.
    const int base = tap_of_pair(p, tile, pairs.first_query, pairs.first_key);
#pragma unroll 1
    for (int n = 0; n < kOther; n += 16) {
#pragma unroll 1
      for (int c = columns.first; c < columns.end; c += 8) {
        const int nearest = kQueries ? base + n - c : c - base + n;  // own position of the first of both
        if (kQueries ? nearest + 15 < 0 || nearest - 7 > 15 : nearest + 22 < 0 || nearest > 15) continue;
        float out[4] = {};
        multiply(out, !kQueries, n, c);
        for (int e = 0; e < 4; ++e) {
          const int by = pair + e % 2, m = row + e / 2 * 8, own = kQueries ? nearest + m - by : nearest + m + by;
          if (own >= 0 && own < 16 && c + by < columns.end)
            strip[own * pitch + c + by - columns.first] += out[e] * (kQueries ? t.score_factor : t.rel_factor);
        }
      }
    }
    __syncwarp();
  }
};

// Turns raw products of 16 own positions and others into scores times log2(e), in place; pairs that do not attend get
// -inf. left, right: what the own positions add outside the window, edges: [2][positions], what the others do. Returns
// which attend, bit 4 n + e for element e of fragment n.
template <class T, Own kOwn, int kOther>
CK_DEVICE uint32_t finish_scores(float (&s)[kOther / 8][4], const Relative<T>& rel, const Meeting<kOwn, kOther>& pairs,
                                 const AttentionTile& tile, unsigned real, const float (&left)[2],
                                 const float (&right)[2], const float* edges, const float* strip, int pitch,
                                 int strip_first) {
  constexpr bool kQueries = kOwn == Own::kQueries;
  const Attention& p = rel.p;
  const int lane = opaque(rel.lane), row = lane / 4, pair = lane % 4 * 2, W = rel.W;
  const int positions = static_cast<int>(kQueries ? p.keys : p.queries);
  const bool columns = p.has_columns();
  Span partners[2];
  const int own = opaque(pairs.own);
  uint32_t seen = 0;
  for (int half = 0; half < 2; ++half) partners[half] = pairs.partners(p, tile, own + row + 8 * half);
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n) {
    const Meeting<kOwn, 8> fragment(own, pairs.other + 8 * n);
    const int base = tap_of_pair(p, tile, fragment.first_query, fragment.first_key);
    // Only fragments that meet the window pay for it.
    const bool all_left = fragment.highest(p, tile) < 0, all_right = fragment.lowest(p, tile) >= W;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, col = pair + e % 2, other = fragment.other + col, r = row + 8 * half;
      float value = s[n][e] * rel.t.score_factor;
      if (columns) {
        const int c = kQueries ? base + col - r : base + r - col;
        const bool is_left = all_left || c < 0, is_right = all_right || c >= W;
        value += is_left ? left[half] : is_right ? right[half] : strip[r * pitch + c - strip_first];
        if (edges != nullptr && (is_left || is_right) && other >= 0 && other < positions)
          value += edges[(is_left ? 0 : positions) + other];
      }
      const bool there = (real >> (kQueries ? 8 * n + col : r) & 1u) != 0;
      const bool sees = there && other >= partners[half].first && other < partners[half].end;
      s[n][e] = sees ? value : -infinity<float>();
      seen |= uint32_t{sees} << (4 * n + e);
    }
  }
  return seen;
}

// A lane's pairs of 16 own positions and 32 others, as bits.
constexpr uint32_t kEveryPair = 0xFFFFu;

// Zeros for the pairs that do not attend.
template <int kX>
CK_DEVICE void select_seen(float (&values)[kX][4], uint32_t seen) {
  static_assert(kX == 4);
  if (seen == kEveryPair) return;
#pragma unroll
  for (int n = 0; n < kX; ++n)
    for (int e = 0; e < 4; ++e) values[n][e] = (seen >> (4 * n + e) & 1u) != 0 ? values[n][e] : 0.0f;
}

// Bit 4 n + e: whether dropout keeps element e of fragment n, of kOther / 8. Blocks of keys begin at multiples of 4.
template <Own kOwn, int kOther>
CK_DEVICE uint32_t draw_fragments(const Attention& p, uint64_t seed, int64_t b, int64_t h,
                                  const Meeting<kOwn, kOther>& pairs, int lane) {
  static_assert(kOther <= 64 / 2);
  uint32_t kept = 0;
  lane = opaque(lane);
#pragma unroll 1
  for (int n = 0; n < kOther / 8; ++n) {
    const int other = pairs.other + 8 * n;
    uint32_t mine[4];
    if constexpr (kOwn == Own::kQueries) {
      // Two lanes have the keys of one draw, in the same two rows: each draws for one of the rows.
      const bool odd = (lane & 1) != 0;
      const PhiloxBlock words = pair_words(seed, b, h, pairs.own + lane / 4 + (odd ? 8 : 0), other / 4 + lane % 4 / 2);
      const uint32_t low = __shfl_xor_sync(kAllLanes, odd ? words.word[0] : words.word[2], 1);
      const uint32_t high = __shfl_xor_sync(kAllLanes, odd ? words.word[1] : words.word[3], 1);
      mine[0] = odd ? low : words.word[0], mine[1] = odd ? high : words.word[1];
      mine[2] = odd ? words.word[2] : low, mine[3] = odd ? words.word[3] : high;
    } else {
      // Four lanes have the keys of one draw: each draws for one row of keys and one query.
      const int which = lane / 4 % 4;  // bit 0: the query, bit 1: the half of the keys
      const PhiloxBlock words =
          pair_words(seed, b, h, other + lane % 4 * 2 + which % 2, (pairs.own + lane / 16 * 4 + which / 2 * 8) / 4);
      uint32_t got[4];  // [x]: drawn by the lane whose number differs by x
#pragma unroll
      for (int x = 0; x < 4; ++x) got[x] = __shfl_xor_sync(kAllLanes, select_word(words.word, which ^ x), x * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[e] = select_word(got, e ^ which);
    }
    for (int e = 0; e < 4; ++e) kept |= uint32_t{mine[e] >= p.drop_below} << (4 * n + e);
  }
  return kept;
}

}  // namespace ck::cuda
