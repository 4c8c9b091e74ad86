// attention on tensor cores: 16-bit types, up to 128 channels. A block has 4 warps of 16 or 32 queries each.
#pragma once

#include "csrc/cuda/attention/tiles.cuh"

namespace ck::cuda {

// The depthwise term for 8 channels of a row, added to `value`.
template <class T>
CK_DEVICE void add_taps(float (&value)[8], const AttentionForward& p, const TensorTables& t, const AttentionTile& tile,
                        int64_t b, int64_t h, int i, int d) {
  const int64_t g = h / p.sharing();
  const float* const taps = t.taps + h * p.window() * t.channel_pitch + d;
  const Span range = taps_of(p, tile, i);
  const int start = i + tile.shift - static_cast<int>(p.left), count = min(8, static_cast<int>(p.channels) - d);
#pragma unroll 1
  for (int c = range.first; c < range.end; ++c) {
    if (!real_key(p, b, start + c)) continue;
    const float* const tap = taps + c * t.channel_pitch;
    float v[8];
    load_channels(v, at<T>(p.v, b, start + c, g) + d * p.v.channel, p.v.channel, count, t.vectors);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += tap[e] * v[e];
  }
  if (p.value_conv_bias.data == nullptr) return;
  const float scale = tap_scale<float>(p, h);
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < count) value[e] += table_at<float>(p.value_conv_bias, h, d + e, 0) * scale;
}

// Blocks: parts, heads, batch rows; a block takes every plan.query_parts-th tile. `resident`: shared memory holds all
// keys and values, which then are read once for all its tiles.
template <class T, int D>
CK_GLOBAL(kTensorThreads, 2)
void attention_forward(const CK_PARAM AttentionForward p, const CK_PARAM TensorTables t, int64_t tiles, int64_t parts,
                       bool resident) {
  constexpr int kM = kForwardFragments<D>, kKeys = kForwardKeys, kPitch = D + 8, kRows = kForwardRows<D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // 32 bits are enough for numbers of blocks, and leave registers to other things.
  const int part = static_cast<int>(blockIdx.x % parts), unit = static_cast<int>(blockIdx.x / parts);
  const int b = unit / static_cast<int>(p.heads), h = unit % static_cast<int>(p.heads);
  const int g = h / static_cast<int>(p.sharing());
  const int channels = static_cast<int>(p.channels);
  const bool low_rank = p.rel_query.data != nullptr;
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 8 : kPitch;
  const bool all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);
  const Relative<T> rel(p, t, h, lane);
  const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + int64_t{unit} * 2 * p.keys;

  T* const q_rows = reinterpret_cast<T*>(shared_memory());
  T* const r_rows = low_rank ? q_rows + kRows * kPitch : q_rows;
  T* const ring = low_rank ? r_rows + kRows * rel_pitch : q_rows + kRows * kPitch;
  const int stages = resident ? static_cast<int>(ceil_div(p.keys, kKeys)) : 2;
  float* const strips = reinterpret_cast<float*>(ring + stages * 2 * kKeys * kPitch);
  const int strip_pitch = static_cast<int>(t.strip_pitch);
  float* const strip = strips + warp * 16 * strip_pitch;
  const auto key_rows = [&](int stage) { return ring + stage * 2 * kKeys * kPitch; };
  const auto copy_keys = [&](int stage, int j0, Span keys, unsigned real) {
    const unsigned there = real & those_in(keys, j0);
    copy_rows(key_rows(stage), kPitch, p.k, b, g, j0, there, channels, padded, t.vectors);
    copy_rows(key_rows(stage) + kKeys * kPitch, kPitch, p.v, b, g, j0, there, channels, padded, t.vectors);
  };
  if (resident) {
    for (int n = 0; n < stages; ++n)
      copy_keys(n, n * kKeys, Span{0, static_cast<int>(p.keys)}, real_keys(p, ask_mask(p, b, n * kKeys, lane)));
    cp_async_commit();
  }

#pragma unroll 1
  for (int n = part; n < tiles; n += static_cast<int>(parts)) {
    // With `causal` the longest tiles are the last ones.
    const AttentionTile tile(p, tiles - 1 - n, kRows, false);
    if (tile.count <= 0) continue;
    const Span keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
    const int begin = keys.first >= keys.end ? keys.end : keys.first / (resident ? kKeys : 8) * (resident ? kKeys : 8);
    __syncthreads();
    const Span queries{tile.first, tile.first + tile.count};
    copy_tile<kRows>(q_rows, kPitch, p.q, b, h, tile.first, queries, channels, padded, t.vectors);
    if (low_rank)
      copy_tile<kRows>(r_rows, rel_pitch, p.rel_query, b, h, tile.first, queries, static_cast<int>(p.rank),
                       static_cast<int>(t.rank_pitch), t.rank_vectors);
    cp_async_commit();

    const int own = warp * 16 * kM;  // first row of the warp
    const bool works = own < tile.count;
    float left[kM][2], right[kM][2], top[kM][2], total[kM][2], out[kM][D / 8][4];
    bool finite = false;  // what is not finite in the values is left out
#pragma unroll 1
    for (int walk = 0; walk < (finite ? 2 : 1); ++walk) {
      unsigned coming = real_keys(p, ask_mask(p, b, begin, lane));  // of the next tile
      if (!resident && begin < keys.end) copy_keys(0, begin, keys, coming);
      unsigned asked = ask_mask(p, b, begin + kKeys, lane);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int c = 0; c < D / 8; ++c)
          for (int e = 0; e < 4; ++e) out[m][c][e] = 0;
        for (int half = 0; half < 2; ++half) {
          top[m][half] = -infinity<float>();
          total[m][half] = 0;
        }
        rel.query_edges(left[m], right[m], r_rows + (own + 16 * m) * rel_pitch, rel_pitch);
      }
      const FarTiles<Own::kQueries, kKeys, 16 * kM> far(p, tile, tile.first + own);
      // With up to 64 channels registers have room for the warp's queries.
      constexpr bool kKept = D <= 64;
      uint32_t kept_q[kKept ? D / 16 : 1][kM][4];
      if constexpr (kKept)
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
          for (int m = 0; m < kM; ++m) load_left(kept_q[k][m], q_rows + (own + 16 * m) * kPitch + 16 * k, kPitch, lane);

#pragma unroll 1
      for (int j0 = begin; j0 < keys.end; j0 += kKeys) {
        const int stage = resident ? j0 / kKeys : (j0 - begin) / kKeys % 2;
        const unsigned real = coming;
        coming = real_keys(p, asked);
        if (!resident && j0 + kKeys < keys.end) copy_keys(1 - stage, j0 + kKeys, keys, coming);
        asked = ask_mask(p, b, j0 + 2 * kKeys, lane);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const T* const k_rows = key_rows(stage);
        const T* const v_rows = k_rows + kKeys * kPitch;
        if (works) {
          float s[kM][kKeys / 8][4] = {};
          if (p.qk) {
            each_piece<D, D / 16>(all, [&](int k) {
              uint32_t loaded[kM][4];
              if constexpr (!kKept)
#pragma unroll
                for (int m = 0; m < kM; ++m)
                  load_left(loaded[m], q_rows + (own + 16 * m) * kPitch + 16 * k, kPitch, lane);
              const auto& a = kKept ? kept_q[k] : loaded;
#pragma unroll
              for (int x = 0; x < kKeys / 16; ++x) {
                uint32_t right_rows[2][2];
                load_right_rows(right_rows, k_rows + 16 * x * kPitch + 16 * k, kPitch, lane);
#pragma unroll
                for (int m = 0; m < kM; ++m)
                  for (int y = 0; y < 2; ++y) mma_m16n8k16<T>(s[m][2 * x + y], a[m], right_rows[y]);
              }
            });
          }
          const bool all_far = edges == nullptr && far.has(j0, real == ~0u);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const int i0 = tile.first + own + 16 * m;
            const Meeting<Own::kQueries, kKeys> pairs(i0, j0);
            float factor = t.score_factor, added[2] = {};
            if (all_far || (kM > 1 && edges == nullptr && pairs.far(p, tile, real))) {
              const bool is_left = pairs.is_left(p, tile);
              for (int half = 0; half < 2; ++half) added[half] = is_left ? left[m][half] : right[m][half];
            } else {
              Span columns{0, 0};
              if (p.has_columns()) {
                columns = pairs.columns(p, tile);
                rel.fill_strip(strip, strip_pitch, pairs, tile, columns, r_rows + (own + 16 * m) * rel_pitch, rel_pitch,
                               k_rows, kPitch);
              }
              finish_scores(s[m], rel, pairs, tile, real, left[m], right[m], edges, strip, strip_pitch, columns.first);
              factor = 1;
            }
            float shrink[2];
            bool grows = false;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float highest = -infinity<float>();
#pragma unroll
              for (int x = 0; x < kKeys / 8; ++x)
                highest = fmaxf(highest, fmaxf(s[m][x][2 * half], s[m][x][2 * half + 1]));
              highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
              highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
              const float now = fmaxf(top[m][half], highest * factor + added[half]);
              const float shift = now == -infinity<float>() ? 0.0f : now;
              const float constant = added[half] - shift;
              shrink[half] = fast_exp2(top[m][half] - shift);
              grows = grows || now > top[m][half];
              top[m][half] = now;
              float sum = 0;
#pragma unroll
              for (int x = 0; x < kKeys / 8; ++x)
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                  s[m][x][e] = fast_exp2(s[m][x][e] * factor + constant);
                  sum += s[m][x][e];
                }
              total[m][half] = total[m][half] * shrink[half] + sum;
            }
            // After the first tiles it is rare that one of 16 rows finds a larger score.
            if (__any_sync(kAllLanes, grows)) {
#pragma unroll
              for (int c = 0; c < D / 8; ++c)
                for (int e = 0; e < 4; ++e) out[m][c][e] *= shrink[e / 2];
            }
            if (p.seed != nullptr) {
              const uint32_t kept = draw_fragments(p, static_cast<uint64_t>(*p.seed), b, h, pairs, lane);
#pragma unroll
              for (int x = 0; x < kKeys / 8; ++x)
                for (int e = 0; e < 4; ++e) s[m][x][e] = (kept >> (4 * x + e) & 1u) != 0 ? s[m][x][e] : 0.0f;
            }
          }
          multiply_rows<T>(out, s, v_rows, kPitch, all, lane, finite);
        }
        __syncthreads();
      }
      // Values of other sequences and behind the mask have not been read.
      if (!finite && (p.causal || p.outside == Outside::kMask))
        finite = __syncthreads_or(spoiled(out[0]) || spoiled(out[kM - 1])) != 0;
    }

    // Rows go through shared memory, where the queries lay, to be written whole.
    float factor[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = total[m][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const bool sees = sum != 0.0f;
        factor[m][half] = sees ? static_cast<float>(p.keep_scale) / sum : 0.0f;
        const int r = own + 16 * m + lane / 4 + 8 * half;
        if (lane % 4 == 0 && r < tile.count)
          at<float>(p.lse, b, h, tile.first + r) = sees ? top[m][half] * kLn2 + logf(sum) : -infinity<float>();
      }
    // Not rounded before the depthwise term is added: float32, half the channels at a time.
    float* const stage = reinterpret_cast<float*>(q_rows + own * kPitch);  // [16 kM][kPitch / 2]
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      constexpr int kHalf = D / 2, kFloats = kPitch / 2;
      __syncwarp();
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int c = 0; c < kHalf / 8; ++c)
          for (int e = 0; e < 4; ++e)
            stage[(16 * m + lane / 4 + e / 2 * 8) * kFloats + 8 * c + lane % 4 * 2 + e % 2] =
                factor[m][e / 2] == 0.0f ? 0.0f : out[m][side * (kHalf / 8) + c][e] * factor[m][e / 2];
      __syncwarp();
#pragma unroll 1
      for (int v = lane; v < 16 * kM * (kHalf / 8); v += 32) {
        const int r = v / (kHalf / 8), c = v % (kHalf / 8) * 8, d = side * kHalf + c, i = tile.first + own + r;
        if (own + r >= tile.count || d >= channels) continue;
        float value[8];
        for (int e = 0; e < 8; ++e) value[e] = stage[r * kFloats + c + e];
        if (finite && at<float>(p.lse, b, h, i) != -infinity<float>())
          add_spoiled<T>(value, p.v, b, g, visible_keys(p, tile, i), d, channels - d, t.vectors,
                         [&](int j) { return real_key(p, b, j); });
        if (t.taps != nullptr) add_taps<T>(value, p, t, tile, b, h, i, d);
        store_channels(at<T>(p.out, b, i, h) + d * p.out.channel, p.out.channel, channels - d, t.vectors, value);
      }
    }
  }
  cp_async_wait<0>();
}

}  // namespace ck::cuda
