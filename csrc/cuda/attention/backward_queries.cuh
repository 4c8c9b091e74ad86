// The backward pass of attention on tensor cores, first part: blocks of queries find the probabilities again from lse
// and make d(q), d(rel_query), delta and the sums for the tables of queries.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/scores.cuh"

namespace ck::cuda {

// Blocks: parts, heads, batch rows; a block takes every blocks-th tile of 64 queries. p.query_parts counts warps.
template <class T, int D>
CK_GLOBAL(kTensorThreads, 2)
void attention_backward_queries(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t, int64_t tiles) {
  constexpr int kPitch = D + kVector<T>, kKeys = kGradOthers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = static_cast<int>(p.channels);
  // Numbers of blocks, heads and batch rows have 32 bits and no sign, so that they take no second register as offsets.
  const unsigned blocks = static_cast<unsigned>(p.query_parts) / kTensorWarps, heads = static_cast<unsigned>(p.heads);
  const int parts = static_cast<int>(blocks), part = static_cast<int>(blockIdx.x % blocks);
  const unsigned unit = blockIdx.x / blocks, b = unit / heads, h = unit % heads;
  const unsigned g = h / static_cast<unsigned>(p.sharing());
  const int64_t W = p.window();
  const bool low_rank = p.rel_query.data != nullptr, relative = p.query_rel.data != nullptr;
  const bool has_strip = p.has_query_columns() && p.needs_queries();
  const int rank = static_cast<int>(p.rank);
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + kVector<T> : kPitch;
  const bool all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);

  T* const q_rows = reinterpret_cast<T*>(shared_memory());
  T* const g_rows = q_rows + kGradRows * kPitch;
  T* const r_rows = low_rank ? g_rows + kGradRows * kPitch : q_rows;
  T* const ring = g_rows + kGradRows * (kPitch + (low_rank ? rel_pitch : 0));
  float* const strips = reinterpret_cast<float*>(ring + 4 * kKeys * kPitch);
  const int strip_pitch = static_cast<int>(t.strip_pitch), grad_pitch = static_cast<int>(t.grad_pitch);
  const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + int64_t{unit} * 2 * p.keys;
  const Relative<T> rel(p, t, h, lane, edges, strips + warp * 16 * strip_pitch);
  float* const grad_strips = strips + kTensorWarps * 16 * strip_pitch;
  const int sum_pitch = static_cast<int>(max(t.rank_pitch, t.channel_pitch)) + 4;
  // As sums_in_ring() says.
  const bool in_ring = kWide<T, D> && (!p.has_columns() || t.whole_strips);
  // [16][sum_pitch]
  const auto sums_of = [&](int warp) {
    return (in_ring ? reinterpret_cast<float*>(ring) : grad_strips + kTensorWarps * 16 * grad_pitch) +
           warp * 16 * sum_pitch;
  };

  const auto partial_of = [&](void* sums, int warp, int64_t size) {  // nullptr: not wanted
    const int64_t piece = unit * p.query_parts + part * kTensorWarps + warp;
    return sums == nullptr ? nullptr : static_cast<float*>(sums) + piece * size;
  };
  if (p.grad_query_rel != nullptr)
    for (int64_t e = lane; e < W * rank; e += 32) partial_of(p.partial_query_rel, warp, W * rank)[e] = 0;
  if (p.grad_bias != nullptr)
    for (int64_t e = lane; e < W; e += 32) partial_of(p.partial_bias, warp, W)[e] = 0;
  const float keep_scale = static_cast<float>(p.keep_scale);
  const int own = warp * 16;
  // Found anew where it is needed, so that no pointers are kept.
  const auto grad_strip = [&] {
    const int warp = opaque(threadIdx.x / 32);
    return GradientStrip<T, PitchedRows<T>, SharedSums>{.strip = grad_strips + warp * 16 * grad_pitch,
                                                        .pitch = grad_pitch,
                                                        .whole = t.whole_strips,
                                                        .rows = {r_rows + own * rel_pitch, rel_pitch},
                                                        .table = rel.query_rel(),
                                                        .terms = t.query_terms,
                                                        .W = rel.W,
                                                        .table_pitch = relative ? t.rank_pitch : 0,
                                                        .wants_sums = relative,
                                                        .sums = {sums_of(warp), sum_pitch},
                                                        .partial = partial_of(p.partial_query_rel, warp, W * rank),
                                                        .size = rank,
                                                        .bias = partial_of(p.partial_bias, warp, W),
                                                        .lane = lane};
  };
  const auto copy_keys = [&](int stage, int j0, Range keys, unsigned real) {
    T* const to = ring + stage * 2 * kKeys * kPitch;
    const unsigned there = real & those_in(keys, j0);
    copy_rows<D>(to, kPitch, p.k, b, g, j0, there, channels, padded, t.vectors);
    copy_rows<D>(to + kKeys * kPitch, kPitch, p.v, b, g, j0, there, channels, padded, t.vectors);
  };
  const auto clear_sums = [&] {
    float* const sums = sums_of(opaque(warp));
    for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = 0;
  };

#pragma unroll 1
  for (int n = part; n < tiles; n += parts) {
    const AttentionTile tile(p, tiles - 1 - n, kGradRows, false);
    if (tile.count <= 0) continue;
    const Range keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
    const int begin = keys.first >= keys.end ? keys.end : keys.first / 8 * 8, end = tile.first + tile.count;
    __syncthreads();
    const Range queries{tile.first, end};
    copy_tile<kGradRows, D>(q_rows, kPitch, p.q, b, h, tile.first, queries, channels, padded, t.vectors);
    copy_tile<kGradRows, D>(g_rows, kPitch, p.grad, b, h, tile.first, queries, channels, padded, t.vectors);
    if (low_rank)
      copy_tile<kGradRows>(r_rows, rel_pitch, p.rel_query, b, h, tile.first, queries, rank,
                           static_cast<int>(t.rank_pitch), t.rank_vectors);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    const bool works = own < tile.count;
    const int i0 = tile.first + own, row = lane / 4;
    float left[2], right[2], lse[2], delta[2] = {}, outer[2][2] = {}, grad_q[D / 8][4];
    set_zero(grad_q);
    bool sees[2];
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + row + 8 * half;
      const float found = i < end ? at<float>(p.lse, b, h, i) : -infinity<float>();
      sees[half] = found != -infinity<float>();
      // A query that sees nothing, or does not exist, has no probabilities.
      lse[half] = sees[half] ? found * kLog2e : infinity<float>();
    }
    const bool all_see = __all_sync(kAllLanes, sees[0] && sees[1]) != 0;
    const FarTiles<Side::kQueries, kKeys, 16> far(p, tile, i0);
    rel.query_edges(left, right, PitchedRows<T>{r_rows + own * rel_pitch, rel_pitch});
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
      if (!in_ring) clear_sums();
      if (has_strip && t.whole_strips) grad_strip().clear();
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
          const auto multiply_values = [&] {
            multiply_pairs<T, D, kKeys>(ds, g_rows + own * kPitch, v_rows, kPitch, all, lane);
          };
          if (!kWide<T, D>) multiply_values();
          const PairTile<Side::kQueries, kKeys> pairs(p, tile, i0, j0);
          ScoreTerms terms;
          if (edges == nullptr && all_see && far.has(j0, real == ~0u)) {
            terms = far_scores(rel, pairs.is_left() ? 0 : 1, left, right);
          } else {
            terms = near_scores(s, rel, pairs, real, left, right, PitchedRows<T>{r_rows + own * rel_pitch, rel_pitch},
                                PitchedRows<T>{k_rows, kPitch});
            terms.seen &= (sees[0] ? 0x3333u : 0u) | (sees[1] ? 0xCCCCu : 0u);
          }
          const uint32_t kept =
              p.seed == nullptr ? ~0u : draw_fragments(p, static_cast<uint64_t>(*p.seed), b, h, pairs, lane);
          // So late in wide heads, where registers are few.
          if (kWide<T, D>) multiply_values();
#pragma unroll
          for (int x = 0; x < kKeys / 8; ++x) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float probable = fast_exp2(s[x][e] * terms.factor + (terms.added[e / 2] - lse[e / 2]));
              const float keep = (kept >> (4 * x + e) & 1u) != 0 ? keep_scale : 0.0f;
              ds[x][e] = probable * (ds[x][e] * keep - delta[e / 2]);  // delta is 0 on the first walk
            }
          }
          select_seen(ds, terms.seen);
          if (walk == 0) {
            for (int x = 0; x < kKeys / 8; ++x)
              for (int e = 0; e < 4; ++e) total[e / 2] += ds[x][e];
          } else {
            if (p.qk) multiply_rows<T>(grad_q, ds, k_rows, kPitch, all, lane, walk == 2);
            if (has_strip && walk == 1) scatter_gradients(ds, grad_strip(), pairs, outer);
          }
        }
        __syncthreads();
      }
      if (walk == 0) {
        for (int half = 0; half < 2; ++half) total[half] = row_sum(total[half]);
        finish_delta(total);
      } else if (walk == 1 && __syncthreads_or(spoiled(grad_q))) {
        walks = 3;
        set_zero(grad_q);
      }
    }
    if (!works || !p.needs_queries()) continue;
    if (in_ring) clear_sums();
    if (has_strip) grad_strip().finish(outer, p.clips());
    float* const sums = sums_of(opaque(warp));
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

}  // namespace ck::cuda
