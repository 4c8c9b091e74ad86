// The forward pass of attention on tensor cores: 16-bit types with up to 256 channels, float32 with up to 128.
//
// A block owns a head of a batch row and takes every parts-th tile of its 64 or 128 queries; each of its 4 warps has 16
// or 32 of them. Shared memory holds the tile's rows of q (and of rel_query), two tiles of 32 keys with their values,
// or all of them where they fit, and for each warp a strip of what relative terms add (relative.cuh).
//
// For each tile of queries, the loop over tiles of keys
//   starts the copies of the next tile (cp.async) and waits for those of this one,
//   multiplies q k^T, [16 queries, 32 keys] in fragments, on tensor cores,
//   adds the relative terms and hides what is not seen (scores_of): scores are kept times log2(e),
//   updates maximum and sum of each query and scales its earlier results by the change (online softmax),
//   drops weights (dropout), and adds weights times v to the results, which stay in registers.
// Then results are divided by their sums and go through shared memory, a warp's rows at a time, where the depthwise
// term is added; out and lse are written.
#pragma once

#include "csrc/cuda/attention/softmax.cuh"
#include "csrc/cuda/attention/taps.cuh"

namespace ck::cuda {

// Writes lse, and the results of a warp's 16 kM rows: out over total, plus the depthwise term. Rows go through shared
// memory, where the queries lay, to be written whole. own: the first row of the tile that is the warp's.
template <class T, int kM, int kC>
CK_DEVICE void store_results(const AttentionForward& p, const TensorTables& t, const AttentionTile& tile, unsigned b,
                             unsigned h, int own, const float (&out)[kM][kC][4], const float (&top)[kM][2],
                             const float (&total)[kM][2], T* q_rows, bool finite, int lane) {
  constexpr int kPitch = 8 * kC + kVector<T>;
  const int channels = static_cast<int>(p.channels);
  const unsigned g = h / static_cast<unsigned>(p.sharing());
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(total[m][half]);
      const bool sees = sum != 0.0f;
      factor[m][half] = sees ? static_cast<float>(p.keep_scale) / sum : 0.0f;
      const int r = own + 16 * m + lane / 4 + 8 * half;
      if (lane % 4 == 0 && r < tile.count)
        at<float>(p.lse, b, h, tile.first + r) = sees ? top[m][half] * kLn2 + logf(sum) : -infinity<float>();
    }
  // Not rounded before the depthwise term is added: float32, half the channels at a time.
  float* const stage = reinterpret_cast<float*>(q_rows + own * kPitch);  // [16 kM][kPitch / 2]
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    constexpr int kHalf = 4 * kC, kFloats = kPitch / 2;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half != side) continue;  // registers have no index
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int c = 0; c < kHalf / 8; ++c)
          for (int e = 0; e < 4; ++e)
            stage[(16 * m + lane / 4 + e / 2 * 8) * kFloats + 8 * c + lane % 4 * 2 + e % 2] =
                factor[m][e / 2] == 0.0f ? 0.0f : out[m][half * (kHalf / 8) + c][e] * factor[m][e / 2];
    }
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

// Blocks: parts, heads, batch rows; a block takes every plan.query_parts-th tile. `resident`: shared memory holds all
// keys and values, which then are read once for all its tiles.
template <class T, int D>
CK_GLOBAL(kTensorThreads, 2)
void attention_forward(const CK_PARAM AttentionForward p, const CK_PARAM TensorTables t, int64_t tiles, int64_t parts,
                       bool resident) {
  constexpr int kM = kForwardFragments<T, D>, kKeys = kForwardKeys, kPitch = D + kVector<T>, kRows = kForwardRows<T, D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Numbers of blocks, heads and batch rows have 32 bits and no sign, so that they take no second register as offsets.
  const unsigned blocks = static_cast<unsigned>(parts), heads = static_cast<unsigned>(p.heads);
  const int part = static_cast<int>(blockIdx.x % blocks);
  const unsigned unit = blockIdx.x / blocks, b = unit / heads, h = unit % heads;
  const unsigned g = h / static_cast<unsigned>(p.sharing());
  const int channels = static_cast<int>(p.channels);
  const bool low_rank = p.rel_query.data != nullptr;
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + kVector<T> : kPitch;
  const bool all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);

  T* const q_rows = reinterpret_cast<T*>(shared_memory());
  T* const r_rows = low_rank ? q_rows + kRows * kPitch : q_rows;
  T* const ring = low_rank ? r_rows + kRows * rel_pitch : q_rows + kRows * kPitch;
  const int stages = resident ? static_cast<int>(ceil_div(p.keys, kKeys)) : 2;
  float* const strips = reinterpret_cast<float*>(ring + stages * 2 * kKeys * kPitch);
  const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + int64_t{unit} * 2 * p.keys;
  const Relative<T> rel(p, t, h, lane, edges, strips + warp * 16 * static_cast<int>(t.strip_pitch));
  const auto key_rows = [&](int stage) { return ring + stage * 2 * kKeys * kPitch; };
  const auto copy_keys = [&](int stage, int j0, Range keys, unsigned real) {
    const unsigned there = real & those_in(keys, j0);
    copy_rows<D>(key_rows(stage), kPitch, p.k, b, g, j0, there, channels, padded, t.vectors);
    copy_rows<D>(key_rows(stage) + kKeys * kPitch, kPitch, p.v, b, g, j0, there, channels, padded, t.vectors);
  };
#pragma unroll 1
  for (int n = part; n < tiles; n += static_cast<int>(parts)) {
    // With `causal` the longest tiles are the last ones.
    const AttentionTile tile(p, tiles - 1 - n, kRows, false);
    if (tile.count <= 0) continue;
    const Range keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
    const int begin = keys.first >= keys.end ? keys.end : keys.first / (resident ? kKeys : 8) * (resident ? kKeys : 8);
    __syncthreads();
    const Range queries{tile.first, tile.first + tile.count};
    copy_tile<kRows, D>(q_rows, kPitch, p.q, b, h, tile.first, queries, channels, padded, t.vectors);
    if (low_rank)
      copy_tile<kRows>(r_rows, rel_pitch, p.rel_query, b, h, tile.first, queries, static_cast<int>(p.rank),
                       static_cast<int>(t.rank_pitch), t.rank_vectors);
    cp_async_commit();

    const int own = warp * 16 * kM;  // first row of the warp
    const bool works = own < tile.count;
    float left[kM][2], right[kM][2], top[kM][2], total[kM][2], out[kM][D / 8][4];
    bool finite = false;  // what is not finite in the values is left out
#pragma unroll 1
    while (true) {
      unsigned coming = real_keys(p, ask_mask(p, b, begin, lane));  // of the next tile
      // Of resident keys all, at the beginning.
      const int copies = !resident ? begin < keys.end : n == part && !finite ? stages : 0;
#pragma unroll 1
      for (int stage = 0; stage < copies; ++stage) {
        const Range every{0, static_cast<int>(p.keys)};
        const int j0 = resident ? stage * kKeys : begin;
        copy_keys(stage, j0, resident ? every : keys, real_keys(p, ask_mask(p, b, j0, lane)));
      }
      unsigned asked = ask_mask(p, b, begin + kKeys, lane);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        set_zero(out[m]);
        for (int half = 0; half < 2; ++half) {
          top[m][half] = -infinity<float>();
          total[m][half] = 0;
        }
        rel.query_edges(left[m], right[m], PitchedRows<T>{r_rows + (own + 16 * m) * rel_pitch, rel_pitch});
      }
      const FarTiles<Side::kQueries, kKeys, 16 * kM> far(p, tile, tile.first + own);
      // As many times 16 channels of the warp's queries as fit into registers.
      constexpr int kKept = D > 64 ? 0 : sizeof(T) == 2 ? D / 16 : 2;
      Two<T> kept_q[kKept > 0 ? kKept : 1][kM][4];
      if constexpr (kKept > 0)
#pragma unroll
        for (int k = 0; k < kKept; ++k)
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
        if (works && real != 0) {
          float s[kM][kKeys / 8][4] = {};
          if (p.qk) {
            each_product<T, D>(all, [&](int k) {
              Two<T> loaded[kM][4];
              if (k >= kKept)
#pragma unroll
                for (int m = 0; m < kM; ++m)
                  load_left(loaded[m], q_rows + (own + 16 * m) * kPitch + 16 * k, kPitch, lane);
              const auto& a = k < kKept ? kept_q[k] : loaded;
#pragma unroll
              for (int x = 0; x < kKeys / 16; ++x) {
                Two<T> right_rows[2][2];
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
            const PairTile<Side::kQueries, kKeys> pairs(p, tile, i0, j0);
            ScoreTerms terms;
            if (all_far || (kM > 1 && edges == nullptr && pairs.far(real)))
              terms = far_scores(t, pairs.is_left() ? 0 : 1, left[m], right[m]);
            else
              terms = near_scores(s[m], rel, pairs, real, left[m], right[m],
                                  PitchedRows<T>{r_rows + (own + 16 * m) * rel_pitch, rel_pitch},
                                  PitchedRows<T>{k_rows, kPitch});
            float shrink[2];
            const bool grows = update_softmax(s[m], terms, top[m], total[m], shrink);
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
      if (finite || !(p.causal || p.outside == Outside::kMask)) break;
      if (!__syncthreads_or(spoiled(out[0]) || spoiled(out[kM - 1]))) break;
      finite = true;
    }

    store_results(p, t, tile, b, h, own, out, top, total, q_rows, finite, lane);
  }
  cp_async_wait<0>();
}

}  // namespace ck::cuda
