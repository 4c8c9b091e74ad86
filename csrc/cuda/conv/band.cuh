// Heads of 16 channels and more in 16-bit types: a tile of a head's convolution is a product with a banded matrix that
// is made from its filter, on tensor cores. Both directions obey the same relation,
//
//   out[m, c] = sum over q of A[m, q] in[q, c],   A[m, q] = filter[q - m],   m < 16, q < 15 + taps,
//
// where d(z) has the taps in reverse order (Taps::transposed). Numbers enter the products as sums of bfloat16 terms,
// three for float32, which hold all of its bits; products below 2^-26 of the largest are left out. Zeros of A would
// spread what is not finite, and rows of another sequence: tiles with either are summed tap by tap instead.
#pragma once

#include <type_traits>

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/plan.h"
#include "csrc/cuda/conv/staging.cuh"

namespace ck::cuda {

// What a block of the band kernels does: `channels` channels from c0 on, a piece of a head of one owner; `group` says
// which of their rows.
struct BandBlock {
  int width, log_vectors;  // channels and vectors (as a power of two) of a row in shared memory
  int channels;
  unsigned columns, column, head, group, owner;  // columns: pieces of all heads
  int64_t c0;

  // All in 32 bits, where a division is short.
  CK_DEVICE BandBlock(const Problem& p, int parts, int64_t groups) {
    const unsigned heads = static_cast<unsigned>(p.heads), R = static_cast<unsigned>(p.channels) / heads;
    width = band_width(R, parts);
    log_vectors = width == 2 * kBandUnit ? 3 : 2;
    const unsigned pieces = (R + width - 1) / width, count = static_cast<unsigned>(groups);
    columns = heads * pieces;
    column = blockIdx.x % columns;
    head = column / pieces;
    group = blockIdx.x / columns % count;
    owner = blockIdx.x / columns / count;
    const unsigned inner = column % pieces * width;
    c0 = int64_t{head} * R + inner;
    channels = static_cast<int>(min(R - inner, static_cast<unsigned>(width)));
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

// A filter as the products need it, in shared memory.
template <int kSteps>
struct BandFilter {
  static constexpr int kMargin = kBandTile;

  // filter[j], in the order of the relation, from j = -kMargin on; zeros where there is no tap.
  float values[kMargin + kBandTile * kSteps];
  // Registers of each lane for the 16 x 16 matrices of A and their terms, the largest first.
  uint4 matrices[kSteps][3][32];

  CK_DEVICE float tap(int64_t j) const { return values[kMargin + j]; }

  // Fills all of it, by the whole block. Returns whether products cannot be used.
  CK_DEVICE bool fill(const Problem& p, const BandBlock& block, bool reverse) {
    const Sequence anywhere{0, 0, 0, kUnbounded};
    const FilterAt at(p, block.owner, 0, block.head);
    const Statistics<float> statistics = warp_statistics<float>(p, at, 0, threadIdx.x % 32, anywhere);
    bool bad = false;
    for (int i = threadIdx.x; i < kMargin + kBandTile * kSteps; i += kBandThreads) {
      const int64_t K = p.taps.taps, j = i - kMargin;
      values[i] = j >= 0 && j < K ? tap_of(p, at, 0, reverse ? K - 1 - j : j, statistics, anywhere).value() : 0;
      bad = bad || !splittable(values[i]);
    }
    bad = __syncthreads_or(bad);
    for (int i = threadIdx.x; i < kSteps * 32; i += kBandThreads) {
      const int s = i / 32, lane = i % 32;
      uint32_t words[3][4];
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r % 2 * 8, column = lane % 4 * 2 + r / 2 * 8;
        const Terms low(tap(16 * s + column - row)), high(tap(16 * s + column + 1 - row));
        for (int term = 0; term < 3; ++term) words[term][r] = pair_of(low.bits[term], high.bits[term]);
      }
      for (int term = 0; term < 3; ++term) store_vector(&matrices[s][term][lane], words[term]);
    }
    __syncthreads();
    return bad;
  }

  CK_DEVICE void load(uint32_t (&a)[3][4], int s, int lane) const {
    for (int term = 0; term < 3; ++term) load_vector(a[term], &matrices[s][term][lane]);
  }
};

// A tensor's chunks of kBandRows rows on their way through shared memory: copied as they are, then, unless they are
// single terms already, gated and split by the thread that copied them. A slot of BandLayout is written again only
// after a barrier that comes after its last use in walk_chunks.
template <class T, bool kGate, bool kHalo>
struct BandFeed {
  static constexpr BandLayout kLayout{std::is_same_v<T, f16>, kGate, kHalo};
  static constexpr int kParts = kLayout.parts, kTensors = kLayout.tensors, kRaw = kLayout.raw, kSplit = kLayout.split;
  static constexpr bool kDirect = kParts == 1;

  int base;  // where its shared memory begins, in elements
  int pitch, log_vectors, chunk;

  CK_DEVICE BandFeed(int base, const BandBlock& block)
      : base(base), pitch(band_pitch(block.width)), log_vectors(block.log_vectors), chunk(kBandRows * pitch) {}

  static CK_DEVICE T* at(int element) { return reinterpret_cast<T*>(shared_memory()) + element; }
  CK_DEVICE int end() const { return base + kLayout.chunks() * chunk; }
  CK_DEVICE int raw(int i, int tensor) const { return base + (i % kRaw * kTensors + tensor) * chunk; }
  // The first of the parts of chunk i, which lie a chunk apart.
  CK_DEVICE int parts(int i) const {
    if constexpr (kDirect)
      return raw(i, 0);
    else
      return base + (kRaw * kTensors + i % kSplit * kParts) * chunk;
  }

  // The vectors of a chunk that this thread copies and takes.
  template <class Use>
  CK_DEVICE void for_own_vectors(const Use& use) const {
#pragma unroll 2
    for (int v = threadIdx.x; v < kBandRows << log_vectors; v += kBandThreads)
      use(v >> log_vectors, (v & ((1 << log_vectors) - 1)) * kVector<T>);
  }

  // Starts the copy of chunk i, whose first row is at position s, of a tensor like x; the first `wanted` rows of it.
  template <bool kInput, class P>
  CK_DEVICE void stage(int i, int tensor, const P& p, const Rows& rows, int64_t b, int64_t s, int64_t dilation,
                       int wanted, const BandBlock& block) const {
    stage_rows<T, kInput, kBandRows, kBandThreads, 2>(at(raw(i, tensor)), pitch, log_vectors, p, rows, b, s, dilation,
                                                      wanted, block.c0, block.channels);
  }

  // Takes what this thread has copied; use(values) sees it. Returns whether products cannot be used.
  template <class Use>
  CK_DEVICE bool accept(int i, const Use& use) const {
    bool bad = false;
    for_own_vectors([&](int row, int column) {
      float z[8];
      unpack_vector(z, at(raw(i, 0) + row * pitch + column));
      if constexpr (kGate) {
        float gate[8];
        unpack_vector(gate, at(raw(i, 1) + row * pitch + column));
        for (int e = 0; e < 8; ++e) z[e] *= sigmoid<T>(gate[e]);
      }
      for (int e = 0; e < 8; ++e) bad = bad || !splittable(z[e]);
      if constexpr (!kDirect) {
        uint32_t out[3][4];
        for (int e = 0; e < 4; ++e) {
          const Terms low(z[2 * e]), high(z[2 * e + 1]);
          for (int part = 0; part < 3; ++part) out[part][e] = pair_of(low.bits[part], high.bits[part]);
        }
        for (int part = 0; part < kParts; ++part)
          store_vector(at(parts(i) + part * chunk + row * pitch + column), out[part]);
      }
      use(z);
    });
    return bad;
  }
};

// The rows that windows of chunk i reach, in tiles of 16: those of the chunk, then those of the next.
template <class T>
struct BandWindow {
  int here, next, pitch, chunk;

  template <bool kGate>
  CK_DEVICE BandWindow(const BandFeed<T, kGate, true>& feed, int i)
      : here(feed.parts(i)), next(feed.parts(i + 1)), pitch(feed.pitch), chunk(feed.chunk) {}

  CK_DEVICE const T* row(int tile, int part, int row) const {
    const int chunk_of = tile < kBandWarps ? here : next;
    return BandFeed<T, false, true>::at(chunk_of + part * chunk + (tile % kBandWarps * kBandTile + row) * pitch);
  }
};

// The relation for the 16 rows of tile `first` of a chunk and 32 channels.
template <class T, int kParts, int kSteps>
CK_DEVICE void band_product(float (&out)[4][4], const BandFilter<kSteps>& filter, int steps,
                            const BandWindow<T>& window, int first, int column, int lane) {
  float small[4][4] = {};
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    uint32_t a[3][4];
    filter.load(a, s, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[kParts][4], b[kParts][2];
      for (int part = 0; part < kParts; ++part)
        ldmatrix_x4_trans(words[part], window.row(first + s, part, lane % 16) + column + 16 * half + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        for (int part = 0; part < kParts; ++part) b[part][0] = words[part][2 * n], b[part][1] = words[part][2 * n + 1];
        multiply<3, kParts>(small[2 * half + n], out[2 * half + n], a, b);
      }
    }
  }
  for (int n = 0; n < 4; ++n)
    for (int e = 0; e < 4; ++e) out[n][e] += small[n][e];
}

// Stores two rows, lane / 4 and the eighth after it, of a product of 32 channels, of which a lane has pairs: lanes of
// four exchange pairs for whole vectors. value(n, e): element e of the matrix of 8 channels n. row(half): where the
// channels of the row begin, nullptr: nowhere. In pieces of `bytes`.
template <class T, class Value, class Row>
CK_DEVICE void store_product(int channels, int lane, int bytes, const Value& value, const Row& row) {
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
    if (to != nullptr) store_pieces(to + c, v, channels - c, bytes);
  }
}

// Whether the 16 outputs from position t on, a dilation apart, and all that they read are of one sequence.
CK_DEVICE bool whole_windows(const Problem& p, const Taps& taps, int64_t t) {
  if (p.offsets == nullptr) return true;
  const int64_t last = t + (kBandTile - 1) * taps.dilation;
  const Sequence sequence = sequence_of(p, t);
  return max(taps.source(t, 0), int64_t{0}) >= sequence.begin &&
         min(max(last, taps.source(last, taps.taps - 1)), p.time - 1) < sequence.end;
}

// A problem of which the compiler sees that it has no gate: code for one would take registers from everything around.
template <bool kGate, class P>
CK_DEVICE P with_known_gate(P p) {
  if (!kGate) p.gate.data = nullptr;
  return p;
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

// The rows of a group: body(b, t, count, last) for each run of `count` chunks of a phase of a batch row, from position
// t on; `last`: the phase ends there. `before`: so many positions before 0 belong to it.
template <class Body>
CK_DEVICE void for_runs(const Problem& p, const Taps& taps, int64_t before, const BandBlock& block, int64_t groups,
                        const Body& body) {
  // Fewer than 2^31: positions have at least 32 bytes each.
  const unsigned dilation = static_cast<unsigned>(taps.dilation);
  const unsigned chunks = static_cast<unsigned>(ceil_div(p.time + before, taps.dilation * kBandRows));
  const unsigned all = static_cast<unsigned>(p.owner_batch()) * dilation * chunks;
  const unsigned each = (all + static_cast<unsigned>(groups) - 1) / static_cast<unsigned>(groups);
  const unsigned end = min((block.group + 1) * each, all);
  for (unsigned at = block.group * each; at < end;) {
    const unsigned line = at / chunks, first = at % chunks, count = min(chunks - first, end - at);
    body(int64_t{block.owner} + line / dilation, line % dilation - before + int64_t{first} * kBandRows * taps.dilation,
         static_cast<int>(count), first + count == chunks);
    at += count;
  }
}

// The 16 outputs from position `first` on and of 32 channels, or `channels`, from c on, tap by tap.
template <class T, int kSteps>
CK_DEVICE void slow_outputs(const Forward& p, const BandFilter<kSteps>& filter, const float* bias, int64_t b,
                            int64_t first, int64_t c, int channels, int lane) {
  if (lane >= channels) return;
  const int64_t end = min(first + kBandTile * p.taps.dilation, p.time);
#pragma unroll 1
  for (int64_t t = first; t < end; t += p.taps.dilation) {
    const Sequence sequence = sequence_of(p, t);
    float total = 0;
#pragma unroll 1
    for (int64_t j = 0; j < p.taps.taps; ++j)
      total += filter.tap(j) * load_input<T>(p, b, p.taps.source(t, j), c + lane, sequence);
    *at<T>(p.y, b, t, c + lane) = narrow<T>(total + bias[lane]);
  }
}

// Blocks: heads and their pieces, then groups, then owners.
template <class T, bool kGate>
CK_GLOBAL(kBandThreads, 4)
void band_forward(const CK_PARAM Forward p, int64_t groups) {
  using Feed = BandFeed<T, kGate, true>;
  CK_SHARED(BandFilter<kBandSteps>, filter, 1);
  CK_SHARED(float, bias, 2 * kBandUnit);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.taps.taps);
  const BandBlock block(p, Feed::kParts, groups);
  if (static_cast<int>(threadIdx.x) < block.channels)
    bias[threadIdx.x] = p.bias == nullptr ? 0 : load_as<float>(p.bias, block.c0 + threadIdx.x, p.bias_dtype);
  const bool bad_filter = filter->fill(p, block, false);
  const Feed feed(0, block);
  const int steps = (K + 2 * kBandTile - 2) / kBandTile;

  for_runs(p, p.taps, 0, block, groups, [&](int64_t b, int64_t t0, int count, bool) {
    const auto stage = [&](int i) {
      if (i > count) return;
      const int wanted = (count - i) * kBandRows + K - 1;
      for (int tensor = 0; tensor < Feed::kTensors; ++tensor)
        feed.template stage<true>(i, tensor, p, tensor == 0 ? p.x : p.gate, b, p.taps.source(t0, i * kBandRows),
                                  p.taps.dilation, wanted, block);
    };
    const auto accept = [&](int i) { return feed.accept(i, [](const float (&)[8]) {}); };
    walk_chunks(count, stage, accept, [&](int i, bool slow) {
      const int64_t first = t0 + (i * kBandRows + warp * kBandTile) * p.taps.dilation;
      if (first >= p.time) return;
      slow = slow || bad_filter || !whole_windows(p, p.taps, first);
      const BandWindow<T> window(feed, i);
#pragma unroll 1
      for (int column = 0; column < block.channels; column += kBandUnit) {
        if (slow) {
          slow_outputs<T>(with_known_gate<kGate>(p), *filter, bias + column, b, first, block.c0 + column,
                          block.channels - column, lane);
          continue;
        }
        float out[4][4] = {};
        band_product<T, Feed::kParts>(out, *filter, steps, window, warp, column, lane);
        store_product<T>(
            block.channels - column, lane, p.vector_bytes,
            [&](int j, int e) { return out[j][e] + bias[column + 8 * j + lane % 4 * 2 + e % 2]; },
            [&](int half) {
              const int64_t t = first + (lane / 4 + 8 * half) * p.taps.dilation;
              return t < p.time ? at<T>(p.y, b, t, block.c0 + column) : nullptr;
            });
      }
    });
  });
}

}  // namespace ck::cuda
