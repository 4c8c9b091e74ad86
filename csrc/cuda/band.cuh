// Heads of 16 channels and more in 16-bit types: a tile of a head's convolution is a product with a banded matrix that
// is made from its filter, on tensor cores. Both directions obey the same relation,
//
//   out[m, c] = sum over q of A[m, q] in[q, c],   A[m, q] = filter[q - m],   m < 16, q < 15 + taps,
//
// where d(z) has the taps in reverse order (Taps::transposed). Numbers enter the products as sums of bfloat16 terms,
// three for float32, which hold all of its bits; products below 2^-26 of the largest are left out. Zeros of A would
// spread what is not finite, and rows of another sequence: tiles that meet either are summed tap by tap instead.
#pragma once

#include <type_traits>

#include "config.h"
#include "filters.cuh"
#include "window.cuh"

namespace ck::cuda {

// What a block of the band kernels does: `channels` channels from c0 on, a piece of a head of one owner; `group` says
// which of their rows.
struct BandBlock {
  int width, log_vectors;  // channels and vectors (as a power of two) of a row in shared memory
  int64_t pieces, head, piece, group, owner, c0;
  int channels;

  CK_DEVICE BandBlock(const Problem& p, int parts, int64_t groups) {
    const int64_t R = p.head_channels(), column = p.heads * band_pieces(R, parts);
    width = band_width(R, parts);
    log_vectors = width == 2 * kBandUnit ? 3 : 2;
    pieces = band_pieces(R, parts);
    head = blockIdx.x % column / pieces;
    piece = blockIdx.x % pieces;
    group = blockIdx.x / column % groups;
    owner = blockIdx.x / column / groups;
    c0 = head * R + piece * width;
    channels = static_cast<int>(least(R - piece * width, int64_t{width}));
  }
};

// The bits of float32 numbers that bfloat16 holds too. The sum of the first three is the value, that of the first two
// if it was float16. To nearest; ties need not go to even.
struct Terms {
  uint32_t bits[3];

  CK_DEVICE explicit Terms(float value) {
    for (int i = 0; i < 3; ++i) {
      bits[i] = (__float_as_uint(value) + 0x8000u) & 0xffff0000u;
      value -= __uint_as_float(bits[i]);
    }
  }
};

// Whether Terms are exact: finite, and not rounded up to infinity.
CK_DEVICE bool splittable(float value) { return fabsf(value) < 3.38e38f; }

// Two bfloat16 numbers in a register of a matrix.
CK_DEVICE uint32_t pair_of(uint32_t low, uint32_t high) { return low >> 16 | high; }

// acc += a b, of numbers that are sums of kA and kB terms; what is small against the rest goes to `small`, which may be
// `large` itself.
template <int kA, int kB>
CK_DEVICE void multiply(float (&small)[4], float (&large)[4], const uint32_t (&a)[kA][4], const uint32_t (&b)[kB][2]) {
  if constexpr (kA == 3) mma_m16n8k16<bf16>(small, a[2], b[0]);
  if constexpr (kB == 3) mma_m16n8k16<bf16>(small, a[0], b[2]);
  if constexpr (kA > 1 && kB > 1) mma_m16n8k16<bf16>(small, a[1], b[1]);
  if constexpr (kA > 1) mma_m16n8k16<bf16>(small, a[1], b[0]);
  if constexpr (kB > 1) mma_m16n8k16<bf16>(small, a[0], b[1]);
  mma_m16n8k16<bf16>(large, a[0], b[0]);
}

// filter[j], in the order of the relation, from j = -kBandMargin on; zeros where there is no tap.
constexpr int kBandMargin = 8;
template <int kSteps>
constexpr int kBandFilter = 16 * kSteps + 2 * kBandMargin;

// Fills it, and waits. Returns whether products cannot be used.
template <int kSteps>
CK_DEVICE bool fill_filter(float* filter, const Problem& p, const BandBlock& block, bool reverse) {
  const Sequence anywhere{0, 0, 0, kUnbounded};
  const FilterAt at(p, block.owner, 0, block.head);
  const Statistics<float> statistics = warp_statistics<float>(p, at, 0, threadIdx.x % 32, anywhere);
  bool bad = false;
  for (int i = threadIdx.x; i < kBandFilter<kSteps>; i += kBandThreads) {
    const int64_t K = p.taps.taps, j = i - kBandMargin;
    const float value = j >= 0 && j < K ? tap_of(p, at, 0, reverse ? K - 1 - j : j, statistics, anywhere).value() : 0;
    filter[i] = value;
    bad = bad || !splittable(value);
  }
  return __syncthreads_or(bad);
}

// A as registers. The 16 x 16 matrix of step s has filter[16 s + column - row]: along its diagonals are the same
// numbers, so that it shares two of four registers with itself and its neighbours. Register k holds the pair from
// 8 k + 2 (lane % 4) - lane / 4 on.
template <int kSteps>
struct BandMatrix {
  uint32_t pairs[3][2 * kSteps - 1];

  CK_DEVICE explicit BandMatrix(const float* filter, int lane) {
#pragma unroll
    for (int k = 0; k < 2 * kSteps - 1; ++k) {
      const float* const at = filter + kBandMargin + 8 * k + lane % 4 * 2 - lane / 4;
      const Terms low(at[0]), high(at[1]);
      for (int term = 0; term < 3; ++term) pairs[term][k] = pair_of(low.bits[term], high.bits[term]);
    }
  }

  CK_DEVICE void step(uint32_t (&a)[3][4], int s) const {
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      a[term][0] = a[term][3] = pairs[term][2 * s];
      a[term][1] = s > 0 ? pairs[term][2 * s - 1] : 0;
      a[term][2] = s < kSteps - 1 ? pairs[term][2 * s + 1] : 0;
    }
  }
};

// A tensor's chunks of kBandRows rows on their way through shared memory: copied as they are, then, unless they are
// single terms already, gated and split by the thread that copied them. kHalo: windows of chunk i reach into i + 1.
// A slot is written again only after a barrier that comes after its last use in walk_chunks.
template <class T, bool kGate, bool kHalo>
struct BandFeed {
  static constexpr int kParts = band_parts(std::is_same_v<T, f16>, kGate);
  static constexpr bool kDirect = kParts == 1;
  static constexpr int kTensors = kGate ? 2 : 1;
  // Without a halo the raw rows are read again, by others, for d(gate).
  static constexpr int kRaw = kHalo ? (kDirect ? 4 : 2) : (kDirect || kGate ? 3 : 2);
  static constexpr int kSplit = kDirect ? 0 : kHalo ? 3 : 2;
  static constexpr int kChunks = kRaw * kTensors + kSplit * kParts;

  T* base;
  int pitch, log_vectors, chunk;

  CK_DEVICE BandFeed(char* room, const BandBlock& block)
      : base(reinterpret_cast<T*>(room)),
        pitch(band_pitch(block.width)),
        log_vectors(block.log_vectors),
        chunk(kBandRows * pitch) {}

  CK_DEVICE char* end() const { return reinterpret_cast<char*>(base + kChunks * chunk); }
  CK_DEVICE T* raw(int i, int tensor) const { return base + (i % kRaw * kTensors + tensor) * chunk; }
  // The first of the parts of chunk i, which lie a chunk apart.
  CK_DEVICE T* parts(int i) const {
    if constexpr (kDirect)
      return raw(i, 0);
    else
      return base + (kRaw * kTensors + i % kSplit * kParts) * chunk;
  }

  template <class Use>
  CK_DEVICE void for_own_vectors(const Use& use) const {
    for (int v = threadIdx.x; v < kBandRows << log_vectors; v += kBandThreads)
      use(v >> log_vectors, (v & ((1 << log_vectors) - 1)) * kVector<T>);
  }

  // copy(to, tensor, row, column) starts the copy of 16 bytes.
  template <class Copy>
  CK_DEVICE void stage(int i, const Copy& copy) const {
    for_own_vectors([&](int row, int column) {
      for (int tensor = 0; tensor < kTensors; ++tensor)
        copy(raw(i, tensor) + row * pitch + column, tensor, row, column);
    });
  }

  // Takes what this thread has copied; use(values) sees it. Returns whether products cannot be used.
  template <class Use>
  CK_DEVICE bool accept(int i, const Use& use) const {
    bool bad = false;
    for_own_vectors([&](int row, int column) {
      float z[8];
      unpack(z, raw(i, 0) + row * pitch + column);
      if constexpr (kGate) {
        float gate[8];
        unpack(gate, raw(i, 1) + row * pitch + column);
        for (int e = 0; e < 8; ++e) z[e] *= sigmoid(gate[e]);
      }
      for (int e = 0; e < 8; ++e) bad = bad || !splittable(z[e]);
      if constexpr (!kDirect) {
        uint32_t out[3][4];
        for (int e = 0; e < 4; ++e) {
          const Terms low(z[2 * e]), high(z[2 * e + 1]);
          for (int part = 0; part < 3; ++part) out[part][e] = pair_of(low.bits[part], high.bits[part]);
        }
        for (int part = 0; part < kParts; ++part)
          *reinterpret_cast<uint4*>(parts(i) + part * chunk + row * pitch + column) = {out[part][0], out[part][1],
                                                                                       out[part][2], out[part][3]};
      }
      use(z);
    });
    return bad;
  }

 private:
  static CK_DEVICE void unpack(float (&to)[8], const T* from) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    for (int e = 0; e < 8; ++e) to[e] = widen(T{static_cast<uint16_t>(words[e / 2] >> e % 2 * 16)});
  }
};

// The rows that windows of chunk i reach, in tiles of 16: those of the chunk, then those of the next.
template <class T>
struct BandWindow {
  const T *here, *next;
  int pitch, chunk;

  template <bool kGate>
  CK_DEVICE BandWindow(const BandFeed<T, kGate, true>& feed, int i)
      : here(feed.parts(i)), next(feed.parts(i + 1)), pitch(feed.pitch), chunk(feed.chunk) {}

  CK_DEVICE const T* row(int tile, int part, int row) const {
    return (tile < kBandWarps ? here : next) + part * chunk + (tile % kBandWarps * kBandTile + row) * pitch;
  }
};

// The relation for the 16 rows of tile `first` of a chunk and 16 channels.
template <class T, int kParts, int kSteps>
CK_DEVICE void band_product(float (&out)[2][4], const BandMatrix<kSteps>& matrix, int steps,
                            const BandWindow<T>& window, int first, int column, int lane) {
  float small[2][4] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    uint32_t a[3][4], b[kParts][4], half[kParts][2];
    matrix.step(a, s);
    for (int part = 0; part < kParts; ++part)
      ldmatrix_x4_trans(b[part], window.row(first + s, part, lane % 16) + column + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      for (int part = 0; part < kParts; ++part) half[part][0] = b[part][2 * n], half[part][1] = b[part][2 * n + 1];
      multiply<3, kParts>(small[n], out[n], a, half);
    }
  }
  for (int n = 0; n < 2; ++n)
    for (int e = 0; e < 4; ++e) out[n][e] += small[n][e];
}

// Stores two rows, lane / 4 and the eighth after it, of a product of 32 channels, of which a lane has pairs: lanes of
// four exchange theirs for whole vectors. value(n, e): element e of the matrix of 8 channels n. row(half): where the
// channels of the row begin, nullptr: nowhere.
template <class T, class Value, class Row>
CK_DEVICE void store_product(int channels, int lane, const Value& value, const Row& row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t v[4];
    for (int n = 0; n < 4; ++n) v[n] = narrow_pair<T>(value(n, 2 * half), value(n, 2 * half + 1));
#pragma unroll
    for (int by = 1; by <= 2; by *= 2) {
      const bool upper = (lane & by) != 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if ((n & by) != 0) continue;
        const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? v[n] : v[n + by], by);
        (upper ? v[n] : v[n + by]) = got;
      }
    }
    T* const to = row(half);
    const int c = lane % 4 * kVector<T>;
    if (to != nullptr && c < channels) *reinterpret_cast<uint4*>(to + c) = {v[0], v[1], v[2], v[3]};
  }
}

// Whether all that the 16 outputs from row n on read, and they, are of one sequence.
CK_DEVICE bool whole_windows(const Problem& p, const Reach& reach, int64_t n) {
  if (p.offsets == nullptr) return true;
  const int64_t last = least(n + kBandTile, reach.from.rows(p.time)) - 1;
  const int64_t low = reach.to.position(n + reach.offset);
  const int64_t high = reach.to.position(last + reach.offset + p.taps.taps - 1);
  const Sequence sequence = sequence_of(p, reach.from.position(n));
  return reach.from.position(last) < sequence.end && most(low, int64_t{0}) >= sequence.begin &&
         least(high, p.time - 1) < sequence.end;
}

// Chunks i = 0..count-1 while the next two are on their way: stage(i) starts copies of chunk i, accept(i) takes them
// and returns whether products cannot be used, compute(i, slow) has chunks i and i + 1 to work with.
template <class Stage, class Accept, class Compute>
CK_DEVICE void walk_chunks(int count, const Stage& stage, const Accept& accept, const Compute& compute) {
  for (int i = 0; i < 2; ++i) {
    stage(i);
    cp_async_commit();
  }
  bool before = false;
  for (int i = -1; i < count; ++i) {
    cp_async_wait<1>();
    const bool bad = __syncthreads_or(accept(i + 1));
    stage(i + 3);
    cp_async_commit();
    if (i >= 0) compute(i, before || bad);
    before = bad;
  }
  // What follows may write everywhere.
  cp_async_wait<0>();
  __syncthreads();
}

// The rows of a group: body(b, reach, n0, count, last) for each run of `count` chunks of a phase of a batch row, from
// row n0 on; `last`: the phase ends there. `before`: rows at positions before 0 belong to it.
template <class Body>
CK_DEVICE void for_runs(const Problem& p, const Taps& taps, int64_t before, const BandBlock& block, int64_t groups,
                        const Body& body) {
  const int64_t chunks = ceil_div(ceil_div(p.time + before, taps.dilation), kBandRows);
  const int64_t all = p.owner_batch() * taps.dilation * chunks, each = ceil_div(all, groups);
  const int64_t end = least((block.group + 1) * each, all);
  for (int64_t at = block.group * each; at < end;) {
    const int64_t line = at / chunks, first = at % chunks, count = least(chunks - first, end - at);
    body(block.owner + line / taps.dilation, Reach(taps, line % taps.dilation - before), first * kBandRows,
         static_cast<int>(count), first + count == chunks);
    at += count;
  }
}

// Blocks: heads and their pieces, then groups, then owners.
template <class T, int kSteps, bool kGate>
CK_GLOBAL(kBandThreads, 3)
void band_forward(const CK_PARAM Forward p, int64_t groups) {
  using Feed = BandFeed<T, kGate, true>;
  CK_SHARED(float, filter, kBandFilter<kSteps>);
  CK_SHARED(float, bias, 2 * kBandUnit);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.taps.taps);
  const BandBlock block(p, Feed::kParts, groups);
  if (static_cast<int>(threadIdx.x) < block.channels)
    bias[threadIdx.x] = p.bias == nullptr ? 0 : load_as<float>(p.bias, block.c0 + threadIdx.x, p.bias_dtype);
  const bool bad_filter = fill_filter<kSteps>(filter, p, block, false);
  const BandMatrix<kSteps> matrix(filter, lane);
  const Feed feed(shared_memory(), block);
  const int steps = static_cast<int>(ceil_div(kBandTile - 1 + K, 16));

  for_runs(p, p.taps, 0, block, groups, [&](int64_t b, const Reach& reach, int64_t n0, int count, bool) {
    const auto stage = [&](int i) {
      if (i > count) return;
      feed.stage(i, [&](T* to, int tensor, int row, int column) {
        const int at = i * kBandRows + row;
        const bool wanted = at < count * kBandRows + K - 1 && column < block.channels;
        stage_input(to, p, tensor == 0 ? p.x : p.gate, b, reach.to.position(n0 + at + reach.offset),
                    wanted ? block.c0 + column : p.channels);
      });
    };
    const auto accept = [&](int i) { return feed.accept(i, [](const float (&)[8]) {}); };
    walk_chunks(count, stage, accept, [&](int i, bool slow) {
      const int64_t n = n0 + i * kBandRows + warp * kBandTile;
      if (reach.from.position(n) >= p.time) return;
      slow = slow || bad_filter || !whole_windows(p, reach, n);
      const BandWindow<T> window(feed, i);
      for (int column = 0; column < block.channels; column += kBandUnit) {
        if (slow) {
          if (column + lane >= block.channels) continue;
          const int64_t c = block.c0 + column + lane;
          for (int m = 0; m < kBandTile; ++m) {
            const int64_t t = reach.from.position(n + m);
            if (t >= p.time) break;
            const Sequence sequence = sequence_of(p, t);
            float total = 0;
            for (int j = 0; j < K; ++j)
              total += filter[kBandMargin + j] * load_input<T>(p, b, p.taps.source(t, j), c, sequence);
            *at<T>(p.y, b, t, c) = narrow<T>(total + bias[column + lane]);
          }
          continue;
        }
        float out[2][2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          band_product<T, Feed::kParts>(out[half], matrix, steps, window, warp, column + 16 * half, lane);
        store_product<T>(
            block.channels - column, lane,
            [&](int j, int e) { return out[j / 2][j % 2][e] + bias[column + 8 * j + lane % 4 * 2 + e % 2]; },
            [&](int half) {
              const int64_t t = reach.from.position(n + lane / 4 + 8 * half);
              return t < p.time ? at<T>(p.y, b, t, block.c0 + column) : nullptr;
            });
      }
    });
  });
}

}  // namespace ck::cuda
