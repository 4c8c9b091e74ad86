// The backward pass of attention on tensor cores, first part: blocks of queries find the probabilities again from lse
// and make d(q), d(rel_query), delta and the sums for the tables of queries.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/scores.cuh"
#include "csrc/cuda/attention/warp_tile.cuh"

namespace ck::cuda {

// Blocks: parts, heads, batch rows; a block takes every blocks-th tile of 64 queries. p.query_parts counts warps.
template <class T, int D>
CK_GLOBAL(kTensorThreads, 2)
void attention_backward_queries(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t, int64_t tiles) {
  constexpr int kPitch = D + kVector<T>, kKeys = kGradOthers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = static_cast<int>(p.channels);
  const auto blocks = [&] { return opaque(static_cast<int>(p.query_parts)) / kTensorWarps; };
  const int64_t W = p.window();
  const bool low_rank = p.rel_query.data != nullptr, has_table = p.query_rel.data != nullptr;
  const bool has_strip = p.has_query_columns() && p.needs_queries();
  const int rank = static_cast<int>(p.rank);
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + kVector<T> : kPitch;
  const bool all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);

  T* const q_rows = reinterpret_cast<T*>(shared_memory());
  T* const g_rows = q_rows + kGradRows * kPitch;
  T* const r_rows = low_rank ? g_rows + kGradRows * kPitch : q_rows;
  T* const ring = g_rows + kGradRows * (kPitch + (low_rank ? rel_pitch : 0));
  WarpTile<Side::kQueries>& queries = reinterpret_cast<WarpTile<Side::kQueries>*>(ring + 4 * kKeys * kPitch)[warp];
  const AttentionTile& tile = queries.tile;
  const Range& keys = queries.others;
  float* const strips = reinterpret_cast<float*>(ring + 4 * kKeys * kPitch) + kTensorWarps * kWarpTileBytes / 4;
  const int strip_pitch = static_cast<int>(t.strip_pitch), grad_pitch = static_cast<int>(t.grad_pitch);
  // Found anew where it is needed, so that no pointers are kept.
  const auto relative = [&] {
    const unsigned h = queries.h;
    const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + (queries.b * p.heads + h) * 2 * p.keys;
    return Relative<T>(p, t, h, lane, edges, strips + opaque(threadIdx.x / 32) * 16 * strip_pitch);
  };
  float* const grad_strips = strips + kTensorWarps * 16 * strip_pitch;
  const int sum_pitch = static_cast<int>(max(t.rank_pitch, t.channel_pitch)) + 4;
  // As sums_in_ring() says.
  const bool in_ring = (!p.has_columns() || t.whole_strips) && t.rank_pitch <= D;
  // [16][sum_pitch]
  const auto sums_of = [&](int warp) {
    return (in_ring ? reinterpret_cast<float*>(ring) : grad_strips + kTensorWarps * 16 * grad_pitch) +
           warp * 16 * sum_pitch;
  };

  const auto partial_of = [&](void* sums, int warp, int64_t size) {  // nullptr: not wanted
    const int64_t piece = (queries.b * p.heads + queries.h) * p.query_parts + queries.part * kTensorWarps + warp;
    return sums == nullptr ? nullptr : static_cast<float*>(sums) + piece * size;
  };
  const auto find_queries = [&](int number) {
    __syncwarp();
    if (lane == 0) queries = WarpTile<Side::kQueries>(p, number, static_cast<unsigned>(blocks()), warp * 16);
    __syncwarp();
  };
  find_queries(static_cast<int>(tiles) - 1 - static_cast<int>(blockIdx.x % blocks()));
  if (p.grad_query_rel != nullptr)
    for (int64_t e = lane; e < W * rank; e += 32) partial_of(p.partial_query_rel, warp, W * rank)[e] = 0;
  if (p.grad_bias != nullptr)
    for (int64_t e = lane; e < W; e += 32) partial_of(p.partial_bias, warp, W)[e] = 0;
  const float keep_scale = static_cast<float>(p.keep_scale);
  const int own = warp * 16;
  const auto grad_strip = [&] {
    const Relative<T> rel = relative();
    const int warp = opaque(threadIdx.x / 32);
    return GradientStrip<T, PitchedRows<T>, SharedSums>{.strip = grad_strips + warp * 16 * grad_pitch,
                                                        .pitch = grad_pitch,
                                                        .whole = t.whole_strips,
                                                        .rows = {r_rows + own * rel_pitch, rel_pitch},
                                                        .table = rel.query_rel(),
                                                        .terms = t.query_terms,
                                                        .W = rel.W,
                                                        .table_pitch = has_table ? t.rank_pitch : 0,
                                                        .wants_sums = has_table,
                                                        .sums = {sums_of(warp), sum_pitch},
                                                        .partial = partial_of(p.partial_query_rel, warp, W * rank),
                                                        .size = rank,
                                                        .bias = partial_of(p.partial_bias, warp, W),
                                                        .lane = lane};
  };
  const auto copy_keys = [&](int stage, int j0, unsigned real) {
    const unsigned b = queries.b, g = queries.g;
    T* const to = ring + stage * 2 * kKeys * kPitch;
    const unsigned there = real & those_in(keys, j0);
    copy_rows<D>(to, kPitch, p.k, b, g, j0, there, channels, padded, t.vectors);
    copy_rows<D>(to + kKeys * kPitch, kPitch, p.v, b, g, j0, there, channels, padded, t.vectors);
  };
  const auto clear_sums = [&] {
    float* const sums = sums_of(opaque(warp));
#pragma unroll 1
    for (int e = opaque(lane); e < 16 * sum_pitch; e += 32) sums[e] = 0;
  };

#pragma unroll 1
  for (; queries.number >= 0; find_queries(queries.number - blocks())) {
    if (tile.count <= 0) continue;
    __syncthreads();
    const Range there{tile.first, tile.end()};
    copy_tile<kGradRows, D>(q_rows, kPitch, p.q, queries.b, queries.h, tile.first, there, channels, padded, t.vectors);
    copy_tile<kGradRows, D>(g_rows, kPitch, p.grad, queries.b, queries.h, tile.first, there, channels, padded,
                            t.vectors);
    if (low_rank)
      copy_tile<kGradRows>(r_rows, rel_pitch, p.rel_query, queries.b, queries.h, tile.first, there, rank,
                           static_cast<int>(t.rank_pitch), t.rank_vectors);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    const auto works = [&] { return own < tile.count; };  // found anew
    const int row = lane / 4;
    float left[2], right[2], lse[2], delta[2] = {}, outer[2][2] = {}, grad_q[D / 8][4];
    set_zero(grad_q);
    for (int half = 0; half < 2; ++half) {
      const int i = queries.own + row + 8 * half;
      const float found = i < tile.end() ? at<float>(p.lse, queries.b, queries.h, i) : -infinity<float>();
      // A query that sees nothing, or does not exist, has no probabilities.
      lse[half] = found == -infinity<float>() ? infinity<float>() : found * kLog2e;
    }
    const auto sees = [&](int half) { return lse[half] != infinity<float>(); };
    const bool all_see = __all_sync(kAllLanes, sees(0) && sees(1)) != 0;
    if (lane == 0 && !(all_see && t.key_edges == nullptr)) queries.leave_far();
    relative().query_edges(left, right, PitchedRows<T>{r_rows + own * rel_pitch, rel_pitch});
    const auto finish_delta = [&](const float (&sum)[2]) {
      for (int half = 0; half < 2; ++half) {
        const unsigned b = queries.b, h = queries.h;
        const int i = queries.own + row + 8 * half;
        delta[half] = sees(half) ? sum[half] : 0.0f;
        if (p.grad_lse.data != nullptr && sees(half)) delta[half] -= at<float>(p.grad_lse, b, h, i);
        if (lane % 4 == 0 && i < tile.end())
          static_cast<float*>(p.delta)[(b * p.heads + h) * p.queries + i] = delta[half];
      }
    };
    // Without a depthwise term delta follows from the output; with one it takes a walk of its own.
    const int walks_first = p.value_conv.data != nullptr ? 0 : 1;
    if (walks_first == 1) {
      float sum = 0;
      const int i = queries.own + lane / 2;
      if (i < tile.end())
#pragma unroll 2
        for (int d = lane % 2 * 8; d < channels; d += 16) {
          float grad[8], out[8];
          load_channels(grad, g_rows + (own + lane / 2) * kPitch + d, 1, 8, true);
          load_channels(out, at<T>(p.out, queries.b, i, queries.h) + d * p.out.channel, p.out.channel, channels - d,
                        t.vectors);
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
#pragma unroll 1
    for (int walk = walks_first; walk < (!p.needs_queries() ? 1 : queries.finite ? 3 : 2); ++walk) {
      const int begin = keys.first >= keys.end ? keys.end : keys.first / 8 * 8;
      unsigned coming = 0, asked = ask_mask(p, queries.b, begin, lane);  // of the next tile
      int stage = 1;
      // The first pass only copies: it has no real keys.
#pragma unroll 1
      for (int j0 = begin - kKeys; j0 < keys.end; j0 += kKeys, stage = 1 - stage) {
        const unsigned real = coming;
        coming = real_keys(p, asked);
        if (j0 + kKeys < keys.end) copy_keys(1 - stage, j0 + kKeys, coming);
        asked = ask_mask(p, queries.b, j0 + 2 * kKeys, lane);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const T* const k_rows = ring + stage * 2 * kKeys * kPitch;
        const T* const v_rows = k_rows + kKeys * kPitch;
        if (works() && real != 0) {
          float s[kKeys / 8][4] = {}, ds[kKeys / 8][4];
          if (p.qk) multiply_pairs<T, D, kKeys>(s, q_rows + own * kPitch, k_rows, kPitch, all, lane);
          const auto multiply_values = [&] {
            multiply_pairs<T, D, kKeys>(ds, g_rows + own * kPitch, v_rows, kPitch, all, lane);
          };
          if (!kWide<T, D>) multiply_values();
          const PairTile<Side::kQueries, kKeys> pairs(p, tile, queries.own, j0);
          ScoreTerms terms;
          if (queries.far.has(j0, real == ~0u)) {
            terms = far_scores(t, queries.far.is_left(j0) ? 0 : 1, left, right);
          } else {
            terms = near_scores(s, relative(), pairs, real, left, right,
                                PitchedRows<T>{r_rows + own * rel_pitch, rel_pitch}, PitchedRows<T>{k_rows, kPitch});
            terms.seen &= (sees(0) ? 0x3333u : 0u) | (sees(1) ? 0xCCCCu : 0u);
          }
          const uint32_t kept =
              p.seed == nullptr ? ~0u
                                : draw_fragments(p, static_cast<uint64_t>(*p.seed), queries.b, queries.h, pairs, lane);
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
        if (lane == 0) queries.finite = true;
        __syncwarp();
        set_zero(grad_q);
      }
    }
    if (!works() || !p.needs_queries()) continue;
    if (in_ring) clear_sums();
    if (has_strip) grad_strip().finish(outer, p.clips());
    float* const sums = sums_of(opaque(warp));
    const auto write = [&](const HeadRows& to, int count, bool vectors, float factor, bool finite) {
      __syncwarp();
#pragma unroll 1
      for (int v = lane; v < 16 * ((count + 7) / 8); v += 32) {
        const unsigned b = queries.b, h = queries.h;
        const int r = v % 16, d = v / 16 * 8, i = queries.own + r;
        if (i >= tile.end()) continue;
        float value[8];
        for (int e = 0; e < 8; ++e) value[e] = sums[r * sum_pitch + d + e] * factor;
        if (finite && at<float>(p.lse, b, h, i) != -infinity<float>())
          add_spoiled<T>(value, p.k, b, queries.g, visible_keys(p, tile, i), d, count - d, vectors,
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
    write(p.grad_q, channels, t.vectors, 1, queries.finite);
  }
}

}  // namespace ck::cuda
