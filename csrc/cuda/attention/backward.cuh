// attention_grad on tensor cores, in two passes that find the probabilities again from lse: blocks of queries make
// d(q), d(rel_query), delta and the sums for the tables of queries, blocks of keys d(k), d(v) and those for key_rel.
// Every number has one owner, so results are the same bits in every run.
//
// What flows back to a column of a table lies on a diagonal of pairs: each pair within the window goes to its place in
// a strip [16 own positions][columns], those beyond it are summed in registers, and both meet the tables in
// fold_strip().
#pragma once

#include "csrc/cuda/attention/tiles.cuh"

namespace ck::cuda {

// What a strip of score gradients [16 own positions][columns first .. end - 1] passes on. rows: the 16 positions' own
// vectors, in shared memory.
//   sums [16][sum_pitch] += strip times table^T, partial [window][size] += strip^T times rows, bias [window] +=
//   columns.
// Columns of the strip from `end` up to a multiple of 16 may hold anything.
template <class T>
CK_DEVICE void fold_strip(const float* strip, int pitch, Span columns, const T* rows, int row_pitch, const T* table,
                          int64_t terms, int W, int64_t table_pitch, float* sums, int sum_pitch, float* partial,
                          int size, float* bias, int lane) {
  const int g = lane / 4, pair = lane % 4 * 2;
  __syncwarp();
#pragma unroll 1
  for (int c0 = columns.first; c0 < columns.end; c0 += 16) {
    const auto ds = [&](int row, int c) {
      return c0 + c < columns.end ? strip[row * pitch + c0 + c - columns.first] : 0.0f;
    };
    uint32_t by_row[4], by_column[4];
    for (int e = 0; e < 4; ++e) {
      const int m = g + e % 2 * 8, k = pair + e / 2 * 8;
      by_row[e] = narrow_pair<T>(ds(m, k), ds(m, k + 1));
      by_column[e] = narrow_pair<T>(ds(k, m), ds(k + 1, m));
    }
    if (sums != nullptr) {
#pragma unroll 1
      for (int n = 0; n < table_pitch; n += 8) {
        float out[4] = {};
#pragma unroll 1
        for (int64_t term = 0; term < terms; ++term) {
          const T* const from = table + term * W * table_pitch + n + g;
          const auto at = [&](int c) { return uint32_t{from[min(c0 + c, W - 1) * table_pitch].bits}; };
          const uint32_t b[2] = {at(pair) | at(pair + 1) << 16, at(pair + 8) | at(pair + 9) << 16};
          mma_m16n8k16<T>(out, by_row, b);
        }
        for (int e = 0; e < 4; ++e) sums[(g + e / 2 * 8) * sum_pitch + n + pair + e % 2] += out[e];
      }
    }
    if (partial != nullptr) {
#pragma unroll 1
      for (int n = 0; n < table_pitch; n += 16) {
        uint32_t b[2][2];
        load_right(b, rows + n, row_pitch, lane);
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
                if (value != 0.0f) out[e] += value * widen(rows[row * row_pitch + d]);
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

// The strip of one warp and what it adds to.
template <class T>
struct GradientStrip {
  float* strip;
  int pitch;
  bool whole;  // it holds all columns and is folded once, at the end; otherwise those of one tile at a time
  const T* rows;
  int row_pitch;
  const T* table;
  int64_t terms;
  int W;
  int64_t table_pitch;
  float* sums;
  int sum_pitch;
  float* partial;
  int size;
  float* bias;
  int lane;

  CK_DEVICE void clear() const {
    __syncwarp();
    for (int e = lane; e < 16 * pitch; e += 32) strip[e] = 0;
    __syncwarp();
  }
  CK_DEVICE void fold(Span columns) const {
    fold_strip(strip, pitch, columns, rows, row_pitch, table, terms, W, table_pitch, sums, sum_pitch, partial, size,
               bias, lane);
  }
  // outer[side][half]: this lane's sums left and right of the window.
  CK_DEVICE void finish(float (&outer)[2][2], bool clips) const {
    const auto add = [&](int side, int column) {
      for (int half = 0; half < 2; ++half) {
        float sum = side == 0 ? outer[0][half] : outer[1][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
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
      const Span columns{whole ? 0 : column, whole ? W : column + 1};
      if (whole || clips) fold(columns);
    }
  }
};

// Puts the score gradients of a tile into the strip, and those beyond the window into outer[side][half].
template <class T, Own kOwn, int kOther>
CK_DEVICE void scatter_gradients(const float (&ds)[kOther / 8][4], const GradientStrip<T>& to,
                                 const Meeting<kOwn, kOther>& pairs, const AttentionTile& tile, const Attention& p,
                                 float (&outer)[2][2]) {
  const int lane = opaque(to.lane), row = lane / 4, pair = lane % 4 * 2;
  const Span columns = pairs.columns(p, tile);
  if (columns.first >= columns.end) {
    // Most tiles lie on one side of the window: there is nothing to ask of their pairs.
    const bool is_left = pairs.is_left(p, tile);
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
  const int base = tap_of_pair(p, tile, pairs.first_query, pairs.first_key);
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = row + e / 2 * 8, col = 8 * n + pair + e % 2;
      const int c = kOwn == Own::kQueries ? base + col - r : base + r - col;
      if (c < 0) {
        outer[0][e / 2] += ds[n][e];
      } else if (c >= to.W) {
        outer[1][e / 2] += ds[n][e];
      } else {
        to.strip[r * to.pitch + c - (to.whole ? 0 : columns.first)] = ds[n][e];
      }
    }
  if (!to.whole) to.fold(columns);
}

// acc = 16 rows at `own` times kOther rows at `others`, both [..][channels] in shared memory.
template <class T, int D, int kOther>
CK_DEVICE void multiply_pairs(float (&acc)[kOther / 8][4], const T* own, const T* others, int pitch, bool all,
                              int lane) {
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n)
    for (int e = 0; e < 4; ++e) acc[n][e] = 0;
  each_piece<D, D / 16>(all, [&](int k) {
    uint32_t a[4];
    load_left(a, own + 16 * k, pitch, lane);
#pragma unroll
    for (int x = 0; x < kOther / 16; ++x) {
      uint32_t b[2][2];
      load_right_rows(b, others + 16 * x * pitch + 16 * k, pitch, lane);
      for (int y = 0; y < 2; ++y) mma_m16n8k16<T>(acc[2 * x + y], a, b[y]);
    }
  });
}

// Adds a warp's accumulators times `factor` to its 16 rows of sums in shared memory.
template <int D>
CK_DEVICE void add_rows(float* sums, int pitch, const float (&acc)[D / 8][4], float factor, bool all, int lane) {
  each_piece<D, D / 8>(all, [&](int c) {
    for (int e = 0; e < 4; ++e)
      sums[(lane / 4 + e / 2 * 8) * pitch + 8 * c + lane % 4 * 2 + e % 2] += acc[c][e] * factor;
  });
}

// Blocks: parts, heads, batch rows; a block takes every blocks-th tile of 64 queries. p.query_parts counts warps.
template <class T, int D>
CK_GLOBAL(kTensorThreads, 2)
void attention_backward_queries(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t, int64_t tiles) {
  constexpr int kPitch = D + 8, kKeys = kGradOthers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = static_cast<int>(p.channels);
  const int64_t parts = p.query_parts / kTensorWarps, part = blockIdx.x % parts, unit = blockIdx.x / parts;
  const int64_t b = unit / p.heads, h = unit % p.heads, g = h / p.sharing(), W = p.window();
  const bool low_rank = p.rel_query.data != nullptr, relative = p.query_rel.data != nullptr;
  const bool folds = p.has_query_columns() && p.needs_queries();
  const int rank = static_cast<int>(p.rank);
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 8 : kPitch;
  const bool all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);
  const Relative<T> rel(p, t, h, lane);
  const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + unit * 2 * p.keys;

  T* const q_rows = reinterpret_cast<T*>(shared_memory());
  T* const g_rows = q_rows + kGradRows * kPitch;
  T* const r_rows = low_rank ? g_rows + kGradRows * kPitch : q_rows;
  T* const ring = g_rows + kGradRows * (kPitch + (low_rank ? rel_pitch : 0));
  float* const strips = reinterpret_cast<float*>(ring + 4 * kKeys * kPitch);
  const int strip_pitch = static_cast<int>(t.strip_pitch), grad_pitch = static_cast<int>(t.grad_pitch);
  float* const strip = strips + warp * 16 * strip_pitch;
  float* const grad_strip = strips + kTensorWarps * 16 * strip_pitch + warp * 16 * grad_pitch;
  const int sum_pitch = static_cast<int>(max(t.rank_pitch, t.channel_pitch)) + 4;
  float* const sums = strips + kTensorWarps * 16 * (strip_pitch + grad_pitch) + warp * 16 * sum_pitch;

  const int64_t piece = unit * p.query_parts + part * kTensorWarps + warp;
  float* const partial =
      p.grad_query_rel == nullptr ? nullptr : static_cast<float*>(p.partial_query_rel) + piece * W * rank;
  float* const partial_bias = p.grad_bias == nullptr ? nullptr : static_cast<float*>(p.partial_bias) + piece * W;
  if (partial != nullptr)
    for (int64_t e = lane; e < W * rank; e += 32) partial[e] = 0;
  if (partial_bias != nullptr)
    for (int64_t e = lane; e < W; e += 32) partial_bias[e] = 0;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const float keep_scale = static_cast<float>(p.keep_scale);
  const int own = warp * 16;
  const GradientStrip<T> folded{grad_strip,
                                grad_pitch,
                                t.whole_strips,
                                r_rows + own * rel_pitch,
                                rel_pitch,
                                rel.query_rel(),
                                t.query_terms,
                                rel.W,
                                relative ? t.rank_pitch : 0,
                                relative ? sums : nullptr,
                                sum_pitch,
                                partial,
                                rank,
                                partial_bias,
                                lane};
  const auto copy_keys = [&](int stage, int j0, Span keys, unsigned real) {
    T* const to = ring + stage * 2 * kKeys * kPitch;
    const unsigned there = real & those_in(keys, j0);
    copy_rows(to, kPitch, p.k, b, g, j0, there, channels, padded, t.vectors);
    copy_rows(to + kKeys * kPitch, kPitch, p.v, b, g, j0, there, channels, padded, t.vectors);
  };

#pragma unroll 1
  for (int64_t n = part; n < tiles; n += parts) {
    const AttentionTile tile(p, tiles - 1 - n, kGradRows, false);
    if (tile.count <= 0) continue;
    const Span keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
    const int begin = keys.first >= keys.end ? keys.end : keys.first / 8 * 8, end = tile.first + tile.count;
    __syncthreads();
    const Span queries{tile.first, end};
    copy_tile<kGradRows>(q_rows, kPitch, p.q, b, h, tile.first, queries, channels, padded, t.vectors);
    copy_tile<kGradRows>(g_rows, kPitch, p.grad, b, h, tile.first, queries, channels, padded, t.vectors);
    if (low_rank)
      copy_tile<kGradRows>(r_rows, rel_pitch, p.rel_query, b, h, tile.first, queries, rank,
                           static_cast<int>(t.rank_pitch), t.rank_vectors);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    const bool works = own < tile.count;
    const int i0 = tile.first + own, row = lane / 4;
    float left[2], right[2], lse[2], delta[2] = {}, outer[2][2] = {}, grad_q[D / 8][4];
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
      for (int e = 0; e < 4; ++e) grad_q[c][e] = 0;
    bool sees[2];
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + row + 8 * half;
      const float found = i < end ? at<float>(p.lse, b, h, i) : -infinity<float>();
      sees[half] = found != -infinity<float>();
      // Whoever sees nothing, or is not there, has no probabilities.
      lse[half] = sees[half] ? found * kLog2e : infinity<float>();
    }
    const bool all_see = __all_sync(kAllLanes, sees[0] && sees[1]) != 0;
    const FarTiles<Own::kQueries, kKeys, 16> far(p, tile, i0);
    rel.query_edges(left, right, r_rows + own * rel_pitch, rel_pitch);
    const auto finish_delta = [&](const float (&sum)[2]) {
      for (int half = 0; half < 2; ++half) {
        const int i = i0 + row + 8 * half;
        delta[half] = sees[half] ? sum[half] : 0.0f;
        if (p.grad_lse.data != nullptr && sees[half]) delta[half] -= at<float>(p.grad_lse, b, h, i);
        if (lane % 4 == 0 && i < end) static_cast<float*>(p.delta)[unit * p.queries + i] = delta[half];
      }
    };
    // Without a depthwise term delta follows from the output; with one it takes a walk of its own.
    const int walks_first = p.value_conv.data != nullptr ? 0 : 1;
    if (walks_first == 1) {
      float sum = 0;
      const int i = i0 + lane / 2;
      if (i < end)
#pragma unroll 2
        for (int d = lane % 2 * 8; d < channels; d += 16) {
          float grad[8], out[8];
          load_channels(grad, g_rows + (own + lane / 2) * kPitch + d, 1, 8, true);
          load_channels(out, at<T>(p.out, b, i, h) + d * p.out.channel, p.out.channel, channels - d, t.vectors);
#pragma unroll
          for (int e = 0; e < 8; ++e) sum += grad[e] * out[e];
        }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      float sums_of_rows[2];
      for (int half = 0; half < 2; ++half) sums_of_rows[half] = __shfl_sync(kAllLanes, sum, 2 * (row + 8 * half));
      finish_delta(sums_of_rows);
    }
    if (p.needs_queries()) {
      for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = 0;
      if (folds && t.whole_strips) folded.clear();
    }

    float total[2] = {};  // delta, of the first walk
    int walks = p.needs_queries() ? 2 : 1;
#pragma unroll 1
    for (int walk = walks_first; walk < walks; ++walk) {
      unsigned coming = real_keys(p, ask_mask(p, b, begin, lane));  // of the next tile
      if (begin < keys.end) copy_keys(0, begin, keys, coming);
      unsigned asked = ask_mask(p, b, begin + kKeys, lane);
      cp_async_commit();
      int stage = 0;
#pragma unroll 1
      for (int j0 = begin; j0 < keys.end; j0 += kKeys, stage = 1 - stage) {
        const unsigned real = coming;
        coming = real_keys(p, asked);
        if (j0 + kKeys < keys.end) copy_keys(1 - stage, j0 + kKeys, keys, coming);
        asked = ask_mask(p, b, j0 + 2 * kKeys, lane);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const T* const k_rows = ring + stage * 2 * kKeys * kPitch;
        const T* const v_rows = k_rows + kKeys * kPitch;
        if (works) {
          float s[kKeys / 8][4] = {}, ds[kKeys / 8][4];
          if (p.qk) multiply_pairs<T, D, kKeys>(s, q_rows + own * kPitch, k_rows, kPitch, all, lane);
          multiply_pairs<T, D, kKeys>(ds, g_rows + own * kPitch, v_rows, kPitch, all, lane);
          const Meeting<Own::kQueries, kKeys> pairs(i0, j0);
          float factor = t.score_factor, added[2] = {};
          uint32_t seen = kEveryPair;
          if (edges == nullptr && all_see && far.has(j0, real == ~0u)) {
            const bool is_left = pairs.is_left(p, tile);
            for (int half = 0; half < 2; ++half) added[half] = is_left ? left[half] : right[half];
          } else {
            Span columns{0, 0};
            if (p.has_columns()) {
              columns = pairs.columns(p, tile);
              rel.fill_strip(strip, strip_pitch, pairs, tile, columns, r_rows + own * rel_pitch, rel_pitch, k_rows,
                             kPitch);
            }
            seen = finish_scores(s, rel, pairs, tile, real, left, right, edges, strip, strip_pitch, columns.first);
            for (int half = 0; half < 2; ++half)
              if (!sees[half]) seen &= half == 0 ? 0xCCCCu : 0x3333u;
            factor = 1;
          }
          const uint32_t kept = p.seed == nullptr ? ~0u : draw_fragments(p, seed, b, h, pairs, lane);
#pragma unroll
          for (int x = 0; x < kKeys / 8; ++x) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float probable = fast_exp2(s[x][e] * factor + (added[e / 2] - lse[e / 2]));
              const float keep = (kept >> (4 * x + e) & 1u) != 0 ? keep_scale : 0.0f;
              ds[x][e] = probable * (ds[x][e] * keep - delta[e / 2]);  // delta is 0 on the first walk
            }
          }
          select_seen(ds, seen);
          if (walk == 0) {
            for (int x = 0; x < kKeys / 8; ++x)
              for (int e = 0; e < 4; ++e) total[e / 2] += ds[x][e];
          } else {
            if (p.qk) multiply_rows<T>(grad_q, ds, k_rows, kPitch, all, lane, walk == 2);
            if (folds && walk == 1) scatter_gradients(ds, folded, pairs, tile, p, outer);
          }
        }
        __syncthreads();
      }
      if (walk == 0) {
        for (int half = 0; half < 2; ++half) {
          total[half] += __shfl_xor_sync(kAllLanes, total[half], 1);
          total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
        }
        finish_delta(total);
      } else if (walk == 1 && __syncthreads_or(spoiled(grad_q))) {
        walks = 3;
#pragma unroll
        for (int c = 0; c < D / 8; ++c)
          for (int e = 0; e < 4; ++e) grad_q[c][e] = 0;
      }
    }
    if (!works || !p.needs_queries()) continue;
    if (folds) folded.finish(outer, p.clips());
    const auto write = [&](const HeadRows& to, int count, bool vectors, float factor, bool finite) {
      __syncwarp();
#pragma unroll 1
      for (int v = lane; v < 16 * ((count + 7) / 8); v += 32) {
        const int r = v % 16, d = v / 16 * 8, i = i0 + r;
        if (i >= end) continue;
        float value[8];
        for (int e = 0; e < 8; ++e) value[e] = sums[r * sum_pitch + d + e] * factor;
        if (finite && at<float>(p.lse, b, h, i) != -infinity<float>())
          add_spoiled<T>(value, p.k, b, g, visible_keys(p, tile, i), d, count - d, vectors,
                         [&](int j) { return real_key(p, b, j); });
        store_channels(at<T>(to, b, i, h) + d * to.channel, to.channel, count - d, vectors, value);
      }
      __syncwarp();
    };
    const float scale = static_cast<float>(p.scale), rel_scale = static_cast<float>(p.rel_scale);
    __syncwarp();
    if (low_rank && p.grad_rel_query.data != nullptr) write(p.grad_rel_query, rank, t.rank_vectors, rel_scale, false);
    if (p.grad_q.data == nullptr) continue;
    for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = low_rank ? 0.0f : sums[e] * rel_scale;
    __syncwarp();
    add_rows<D>(sums, sum_pitch, grad_q, scale, all, lane);
    write(p.grad_q, channels, t.vectors, 1, walks == 3);
  }
}

// Adds to 8 channels of value j what the depthwise terms of head h's queries pass on.
template <class T>
CK_DEVICE void add_tap_grads(float (&value)[8], const AttentionBackward& p, const TensorTables& t,
                             const AttentionTile& tile, int64_t b, int64_t h, int j, int d) {
  const float* const taps = t.taps + h * p.window() * t.channel_pitch + d;
  // Query i reads j by tap last - i.
  const int last = j - tile.shift + static_cast<int>(p.left);
  const int count = static_cast<int>(p.causal ? p.left + 1 : p.window()), channels = static_cast<int>(p.channels) - d;
  const int from = max(0, last - (tile.query_end - 1)), to = min(count, last - tile.query_begin + 1);
#pragma unroll 1
  for (int c = from; c < to; ++c) {
    const float* const tap = taps + c * t.channel_pitch;
    float grad[8];
    load_channels(grad, at<T>(p.grad, b, last - c, h) + d * p.grad.channel, p.grad.channel, channels, t.vectors);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += tap[e] * grad[e];
  }
}

// Blocks: parts, groups, batch rows; a block takes every blocks-th tile of 64 keys. p.key_parts counts warps.
template <class T, int D>
CK_GLOBAL(kTensorThreads, 2)
void attention_backward_keys(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t, int64_t tiles) {
  constexpr int kPitch = D + 8, kQueries = kGradOthers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = static_cast<int>(p.channels);
  const int64_t parts = p.key_parts / kTensorWarps, part = blockIdx.x % parts, unit = blockIdx.x / parts;
  const int64_t b = unit / p.groups, g = unit % p.groups, W = p.window();
  const bool low_rank = p.rel_query.data != nullptr, scores = p.needs_keys();
  const bool folds = p.key_rel.data != nullptr && scores, all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 8 : kPitch;

  T* const k_rows = reinterpret_cast<T*>(shared_memory());
  T* const v_rows = k_rows + kGradRows * kPitch;
  T* const ring = v_rows + kGradRows * kPitch;
  const int stage_size = kQueries * (2 * kPitch + (low_rank ? rel_pitch : 0));
  float* const scalars = reinterpret_cast<float*>(ring + 2 * stage_size);  // [stage][lse, delta, edges][query]
  float* const strips = scalars + 2 * 4 * kQueries;
  const int strip_pitch = static_cast<int>(t.strip_pitch), grad_pitch = static_cast<int>(t.grad_pitch);
  float* const strip = strips + warp * 16 * strip_pitch;
  float* const grad_strip = strips + kTensorWarps * 16 * strip_pitch + warp * 16 * grad_pitch;
  const int sum_pitch = static_cast<int>(t.channel_pitch) + 4;
  float* const sums = strips + kTensorWarps * 16 * (strip_pitch + grad_pitch) + warp * 16 * sum_pitch;
  const auto partial_of = [&](int64_t h) {
    return static_cast<float*>(p.partial_key_rel) +
           ((b * p.heads + h) * p.key_parts + part * kTensorWarps + warp) * W * channels;
  };
  if (p.grad_key_rel != nullptr)
    for (int64_t n = 0; n < p.sharing(); ++n)
      for (int64_t e = lane; e < W * channels; e += 32) partial_of(g * p.sharing() + n)[e] = 0;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const float keep_scale = static_cast<float>(p.keep_scale);
  const int own = warp * 16, row = lane / 4, pair = lane % 4 * 2;

#pragma unroll 1
  for (int64_t n = part; n < tiles; n += parts) {
    const AttentionTile tile(p, n, kGradRows, true, true);
    if (tile.count <= 0) continue;
    const int key_end = tile.first + tile.count;
    const Span queries = seeing_queries(p, tile, max(tile.first, tile.key_begin), key_end);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kGradRows; r += 32) {
      const int first = tile.first + r;
      const unsigned there = real_keys(p, ask_mask(p, b, first, lane)) & those_in({tile.key_begin, key_end}, first);
      copy_rows(k_rows + r * kPitch, kPitch, p.k, b, g, first, there, channels, D, t.vectors);
      copy_rows(v_rows + r * kPitch, kPitch, p.v, b, g, first, there, channels, D, t.vectors);
    }
    cp_async_commit();
    const int j0 = tile.first + own;
    const bool works = own < tile.count;
    float grad_k[D / 8][4], grad_v[D / 8][4];
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
      for (int e = 0; e < 4; ++e) grad_k[c][e] = grad_v[c][e] = 0;
    for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = 0;
    __syncwarp();
    const unsigned real = real_keys(p, ask_mask(p, b, j0, lane));
    const bool all_real = (real & 0xFFFFu) == 0xFFFFu;
    const FarTiles<Own::kKeys, kQueries, 16> far(p, tile, j0);

    bool finite = false;  // what is not finite in the queries' rows is left out
#pragma unroll 1
    for (int walk = 0; walk < (finite ? 2 : 1); ++walk) {
#pragma unroll 1
      for (int64_t h = g * p.sharing(); h < (g + 1) * p.sharing(); ++h) {
        const Relative<T> rel(p, t, h, lane);
        const float* const edges =
            t.query_edges == nullptr ? nullptr : t.query_edges + (b * p.heads + h) * 2 * p.queries;
        const GradientStrip<T> folded{grad_strip,
                                      grad_pitch,
                                      t.whole_strips,
                                      k_rows + own * kPitch,
                                      kPitch,
                                      rel.key_rel(),
                                      t.key_terms,
                                      rel.W,
                                      t.channel_pitch,
                                      sums,
                                      sum_pitch,
                                      p.grad_key_rel == nullptr ? nullptr : partial_of(h),
                                      channels,
                                      nullptr,
                                      lane};
        // What key_rel adds outside the window, of this lane's keys.
        float left[2] = {}, right[2] = {}, outer[2][2] = {};
        if (t.key_edges != nullptr)
          for (int half = 0; half < 2; ++half) {
            const int64_t j = min(int64_t{j0} + row + 8 * half, p.keys - 1);
            left[half] = t.key_edges[(b * p.heads + h) * 2 * p.keys + j];
            right[half] = t.key_edges[((b * p.heads + h) * 2 + 1) * p.keys + j];
          }
        if (folds && !finite && t.whole_strips) folded.clear();
        const auto copy_queries = [&](int stage, int i0) {
          T* const to = ring + stage * stage_size;
          const unsigned there = those_in(queries, i0);
          copy_rows(to, kPitch, p.q, b, h, i0, there, channels, padded, t.vectors);
          copy_rows(to + kQueries * kPitch, kPitch, p.grad, b, h, i0, there, channels, padded, t.vectors);
          if (low_rank)
            copy_rows(to + 2 * kQueries * kPitch, rel_pitch, p.rel_query, b, h, i0, there, static_cast<int>(p.rank),
                      static_cast<int>(t.rank_pitch), t.rank_vectors);
        };
        // What queries from i0 on have one number of: each warp an array.
        const auto load_scalars = [&](int i0) {
          const int which = warp, i = i0 + lane;
          float value = which == 0 ? -infinity<float>() : 0.0f;
          if (i < queries.end) {
            if (which == 0) {
              value = at<float>(p.lse, b, h, i);
            } else if (which == 1) {
              if (scores) value = static_cast<const float*>(p.delta)[(b * p.heads + h) * p.queries + i];
            } else if (edges != nullptr) {
              value = edges[(which - 2) * p.queries + i];
            }
          }
          return value;
        };
        // Only here, when the number has come, is it looked at.
        const auto store_scalars = [&](int stage, float value) {
          // Whoever sees nothing has no probabilities.
          if (warp == 0) value = value == -infinity<float>() ? infinity<float>() : value * kLog2e;
          scalars[(stage * 4 + warp) * kQueries + lane] = value;
        };
        if (queries.first < queries.end) {
          copy_queries(0, queries.first);
          store_scalars(0, load_scalars(queries.first));
        }
        cp_async_commit();
        int stage = 0;
#pragma unroll 1
        for (int i0 = queries.first; i0 < queries.end; i0 += kQueries, stage = 1 - stage) {
          if (i0 + kQueries < queries.end) copy_queries(1 - stage, i0 + kQueries);
          cp_async_commit();
          const float coming = load_scalars(i0 + kQueries);  // nobody waits for it before this tile is done
          cp_async_wait<1>();
          __syncthreads();
          const T* const q_rows = ring + stage * stage_size;
          const T* const g_rows = q_rows + kQueries * kPitch;
          const T* const r_rows = low_rank ? g_rows + kQueries * kPitch : q_rows;
          const float* const of_queries = scalars + stage * 4 * kQueries;
          if (works) {
            float s[kQueries / 8][4] = {}, ds[kQueries / 8][4] = {};
            if (p.qk) multiply_pairs<T, D, kQueries>(s, k_rows + own * kPitch, q_rows, kPitch, all, lane);
            if (scores) multiply_pairs<T, D, kQueries>(ds, v_rows + own * kPitch, g_rows, kPitch, all, lane);
            const Meeting<Own::kKeys, kQueries> pairs(j0, i0);
            float factor = t.score_factor, added[2] = {};
            int side = -1;  // of the window, where all queries have the same
            uint32_t seen = kEveryPair;
            const unsigned blind = __ballot_sync(kAllLanes, of_queries[lane] == infinity<float>());
            if (blind == 0 && far.has(i0, all_real)) {
              if (p.has_columns()) side = pairs.is_left(p, tile) ? 0 : 1;
              for (int half = 0; half < 2; ++half)
                added[half] = side == 0 ? left[half] : side == 1 ? right[half] : 0.0f;
            } else {
              Span columns{0, 0};
              if (p.has_columns()) {
                columns = pairs.columns(p, tile);
                rel.fill_strip(strip, strip_pitch, pairs, tile, columns, r_rows, rel_pitch, k_rows + own * kPitch,
                               kPitch);
              }
              seen = finish_scores(s, rel, pairs, tile, real, left, right, edges, strip, strip_pitch, columns.first);
              for (int x = 0; x < kQueries / 8; ++x)
                for (int e = 0; e < 4; ++e) seen &= ~((blind >> (8 * x + pair + e % 2) & 1u) << (4 * x + e));
              factor = 1;
            }
            const uint32_t kept = p.seed == nullptr ? ~0u : draw_fragments(p, seed, b, h, pairs, lane);
#pragma unroll
            for (int x = 0; x < kQueries / 8; ++x) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const float* const query = of_queries + 8 * x + pair + e % 2;
                const float constant = (side < 0 ? 0.0f : query[(2 + side) * kQueries]) + added[e / 2] - query[0];
                const float probable = fast_exp2(s[x][e] * factor + constant);
                const float keep = (kept >> (4 * x + e) & 1u) != 0 ? keep_scale : 0.0f;
                ds[x][e] = probable * (ds[x][e] * keep - query[kQueries]);
                s[x][e] = probable * keep;
              }
            }
            select_seen(s, seen);
            select_seen(ds, seen);
            multiply_rows<T>(grad_v, s, g_rows, kPitch, all, lane, finite);
            if (scores && p.qk) multiply_rows<T>(grad_k, ds, q_rows, kPitch, all, lane, finite);
            if (folds && !finite) scatter_gradients(ds, folded, pairs, tile, p, outer);
          }
          store_scalars(1 - stage, coming);
          __syncthreads();
        }
        // Without a query that meets them the keys are still on their way. The next head's first rows may go where
        // others still read.
        cp_async_wait<0>();
        __syncthreads();
        if (folds && works && !finite) folded.finish(outer, p.clips());
      }
      if (finite || !__syncthreads_or(spoiled(grad_k) || spoiled(grad_v))) continue;
      finite = true;
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
        for (int e = 0; e < 4; ++e) grad_k[c][e] = grad_v[c][e] = 0;
    }
    if (!works) continue;
    // Of rows `from` of the queries.
    const auto write = [&](const HeadRows& to, const HeadRows& from, bool taps) {
      __syncwarp();
#pragma unroll 1
      for (int v = lane; v < 16 * ((channels + 7) / 8); v += 32) {
        const int r = v % 16, d = v / 16 * 8, j = j0 + r;
        if (j < tile.key_begin || j >= key_end) continue;
        float value[8];
        const bool there = real_key(p, b, j);
        for (int e = 0; e < 8; ++e) value[e] = there ? sums[r * sum_pitch + d + e] : 0.0f;
        if (taps && there)
          for (int64_t h = g * p.sharing(); h < (g + 1) * p.sharing(); ++h)
            add_tap_grads<T>(value, p, t, tile, b, h, j, d);
        if (finite && there && from.data != nullptr)
          for (int64_t h = g * p.sharing(); h < (g + 1) * p.sharing(); ++h)
            add_spoiled<T>(value, from, b, h, seeing_queries(p, tile, j, j + 1), d, channels - d, t.vectors,
                           [&](int i) { return at<float>(p.lse, b, h, i) != -infinity<float>(); });
        store_channels(at<T>(to, b, j, g) + d * to.channel, to.channel, channels - d, t.vectors, value);
      }
      __syncwarp();
    };
    const float scale = static_cast<float>(p.scale);
    __syncwarp();
    if (p.grad_k.data != nullptr) {
      for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] *= scale;
      __syncwarp();
      add_rows<D>(sums, sum_pitch, grad_k, scale, all, lane);
      write(p.grad_k, p.qk ? p.q : HeadRows{}, false);
    }
    if (p.grad_v.data == nullptr) continue;
    for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = 0;
    __syncwarp();
    add_rows<D>(sums, sum_pitch, grad_v, 1, all, lane);
    write(p.grad_v, p.grad, p.value_conv.data != nullptr);
  }
}

}  // namespace ck::cuda
