// The windows of the time kernels: a lane's 8 consecutive positions, what they read in shared memory, and their sums.
#pragma once

#include <type_traits>

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/staging.cuh"
#include "csrc/cuda/conv/time_tiles.h"

namespace ck::cuda {

// 16 bytes.
template <class T>
struct alignas(16) Words {
  T at[kVector<T>];
};

template <class E>
constexpr int kChunkVectors = kEight / kVector<E>;
template <class E>
constexpr int kChunkBytes = kChunkVectors<E> * kVectorBytes;

// Vector v of chunk n in shared memory. The two of float32 change places from one 128 bytes to the next, so that 8
// lanes that read the same one of their chunks find 8 different banks.
template <class E>
CK_DEVICE Words<E>* vector_at(char* chunks, int n, int v) {
  char* const chunk = chunks + n * kChunkBytes<E>;
  const unsigned turn = kChunkVectors<E> == 2 ? shared_address(chunk) / 128 % 2 : 0;
  return reinterpret_cast<Words<E>*>(chunk) + (static_cast<unsigned>(v) ^ turn);
}

template <class E>
CK_DEVICE void read_chunk(char* chunks, int n, float* to) {
#pragma unroll
  for (int v = 0; v < kChunkVectors<E>; ++v) unpack_vector(to + v * kVector<E>, vector_at<E>(chunks, n, v)->at);
}

// Element e of these chunks, the first of a vector.
template <class E>
CK_DEVICE E* element_at(char* chunks, int e) {
  const unsigned vector = static_cast<unsigned>(e) / kVector<E>;
  return vector_at<E>(chunks, static_cast<int>(vector / kChunkVectors<E>), static_cast<int>(vector % kChunkVectors<E>))
      ->at;
}

// Of a vector of positions from t on, those that exist.
template <class T>
CK_DEVICE int rest_of(const Problem& p, int t) {
  return min(static_cast<int>(p.time) - t, kVector<T>);
}

// Stores a lane's positions t .. t + 7, as far as they come before `end`, at `to`. By the whole warp: two lanes of a
// row exchange vectors of float32, so that both write 32 bytes side by side.
template <class T>
CK_DEVICE void store_chunk(const Problem& p, const TimeTiles& g, T* to, int t, int end, const float (&from)[kEight]) {
  if constexpr (kChunkVectors<T> == 2) {
    if (p.vector_bytes == 16 && g.lanes > 1) {
      const bool odd = threadIdx.x % 2 != 0;
      float first[4], second[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float got = __shfl_xor_sync(kAllLanes, odd ? from[e] : from[4 + e], 1);
        first[e] = odd ? got : from[e];
        second[e] = odd ? from[4 + e] : got;
      }
      to -= odd ? 4 : 0;
      t -= odd ? 4 : 0;
      if (t < end) store_four(to, first[0], first[1], first[2], first[3]);
      if (t + kEight < end) store_four(to + kEight, second[0], second[1], second[2], second[3]);
      return;
    }
  }
  const bool whole = p.vector_bytes == 16 && t + kEight <= end;
#pragma unroll
  for (int v = 0; v < kEight; v += kVector<T>) {
    uint32_t out[4];
    pack<T>(out, from + v);
    if (whole)
      store_vector(to + v, out);
    else if (t + v < end)
      store_pieces(to + v, out, rest_of<T>(p, t + v), p.vector_bytes);
  }
}

// z at positions s .. s + 7 of a row: x * open, or 0 by selection where a position is `off`. x and the gate at position
// s; nullptr: not needed, or none. kStaged: chunks in shared memory, with zeros outside of the row, where otherwise
// nothing is read.
template <class T, bool kStaged>
struct ChunkInputs {
  using From = std::conditional_t<kStaged, char*, const T*>;

  float x[kEight] = {}, open[kEight];
  unsigned off = 0;

  CK_DEVICE ChunkInputs(const Problem& p, int64_t b, int s, From x_at, From gate, Activation gates) {
    const auto load = [&](From from, int k, int count, float* to) {
      if constexpr (kStaged) {
        unpack_vector(to + k, element_at<T>(from, k));
      } else {
        uint32_t words[4];
        load_pieces(words, from + k, count, p.vector_bytes);
        unpack<T>(to + k, words);
      }
    };
#pragma unroll
    for (int i = 0; i < kEight; ++i) open[i] = 1;
#pragma unroll
    for (int k0 = 0; k0 < kEight; k0 += kVector<T>) {
      if (s + k0 < 0 || s + k0 >= static_cast<int>(p.time)) {
        off |= ((1u << kVector<T>)-1u) << k0;
        continue;
      }
      const int count = rest_of<T>(p, s + k0);
      if (x_at != nullptr) load(x_at, k0, count, x);
      if (gate != nullptr) {
        load(gate, k0, count, open);
        with_activation(gates, [&](Activation act) {
#pragma unroll
          for (int k = k0; k < k0 + kVector<T>; ++k) open[k] = activated(open[k], sigmoid<T>(open[k]), act);
        });
      }
      if (p.mask == nullptr) continue;
      const bool* mask = p.mask + b * p.mask_batch + (s + k0) * p.mask_time;
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k, mask += p.mask_time) off |= unsigned{k < count && !*mask} << (k0 + k);
    }
  }

  CK_DEVICE bool is_off(int i) const { return (off >> i & 1u) != 0; }
  CK_DEVICE float z(int i) const { return is_off(i) ? 0.0f : x[i] * open[i]; }
};

// Outputs [first, last) of a lane are in one sequence, which has elements [from, to) of the lane's window.
struct ChunkPart {
  int first = 0, last = kEight;
  unsigned from = 0, to = 0;

  CK_DEVICE bool has(int i) const { return i >= first && i < last; }
};

// Calls body(part) until the 8 outputs at t are done: once, or, by the whole warp, as often as one of its lanes has
// sequences.
template <bool kPacked, class Body>
CK_DEVICE void for_parts(const Problem& p, const TimeTiles& g, int t, const Body& body) {
  ChunkPart part;
  if constexpr (kPacked) {
    const int64_t start = g.window_start(t);
    const auto element = [&](int64_t s) {
      return static_cast<unsigned>(min(max(s - start, int64_t{0}), int64_t{kEight * (g.chunks + 1)}));
    };
    for (part.last = 0; __any_sync(kAllLanes, part.last < kEight);) {
      part.first = part.last;
      const Sequence sequence = sequence_of(p, t + part.first);
      part.from = element(sequence.begin);
      part.to = element(sequence.end);
      // What follows the last sequence reads it.
      const int64_t outputs = sequence.end - t;
      part.last = outputs > part.first ? static_cast<int>(min(outputs, int64_t{kEight})) : kEight;
      body(part);
    }
  } else {
    body(part);
  }
}

// Two chunks of a lane's window in registers: what its outputs read at elements 8 n .. 8 n + 7.
template <class E, bool kPacked>
struct ChunkWindow {
  char* row;
  int lane_chunk, held = -1;
  ChunkPart part;
  float value[2 * kEight];

  CK_DEVICE ChunkWindow(char* row, int lane_chunk, const ChunkPart& part)
      : row(row), lane_chunk(lane_chunk), part(part) {}

  CK_DEVICE void move_to(int n) {
    if (held == n) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) value[k] = value[kEight + k];
    } else {
      read(n, value);
    }
    read(n + 1, value + kEight);
    held = n + 1;
  }

 private:
  CK_DEVICE void read(int n, float* to) {
    read_chunk<E>(row, lane_chunk + n, to);
    if constexpr (kPacked) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) {
        const unsigned element = static_cast<unsigned>(kEight * n + k);
        if (element < part.from || element >= part.to) to[k] = 0;
      }
    }
  }
};

// Calls use(u) for the elements 8 n + u that a tap reads, mostly all of them.
template <class Use>
CK_DEVICE void for_taps(unsigned mask, const Use& use) {
  if (mask == 0xffu) {
#pragma unroll
    for (int u = 0; u < kEight; ++u) use(u);
  } else {
#pragma unroll
    for (int u = 0; u < kEight; ++u)
      if ((mask >> u & 1u) != 0) use(u);
  }
}

// sum[i] = sum over taps of the filter times what output i reads, for the outputs of the window's part.
template <class Window>
CK_DEVICE void correlate(float (&sum)[kEight], Window window, const TimeTiles& g, const uint8_t* masks,
                         const float* filter) {
  float total[kEight] = {};
#pragma unroll 1
  for (int n = 0; n < g.chunks; ++n) {
    const unsigned mask = masks[n];
    if (mask == 0) continue;
    window.move_to(n);
    const float4 low = reinterpret_cast<const float4*>(filter)[2 * n];
    const float4 high = reinterpret_cast<const float4*>(filter)[2 * n + 1];
    const float w[kEight] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for_taps(mask, [&](int u) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) total[i] += w[u] * window.value[u + i];
    });
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum[i] = window.part.has(i) ? total[i] : sum[i];
}

// sums[e] += sum over outputs i of z[i] times what output i reads at element 8 first + e.
template <int kChunks, class Window>
CK_DEVICE void collect(float (&sums)[kChunks * kEight], Window window, const TimeTiles& g, const uint8_t* masks,
                       int first, const float (&z)[kEight]) {
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const int n = first + k;
    const unsigned mask = n < g.chunks ? masks[n] : 0u;
    if (mask == 0) continue;
    window.move_to(n);
    for_taps(mask, [&](int u) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) sums[k * kEight + u] += z[i] * window.value[u + i];
    });
  }
}

// Calls use(shift) with a number that the compiler knows, from 0 to 7: bit by bit.
template <int kBit = kEight / 2, int kKnown = 0, class Use>
CK_DEVICE void with_known_shift(int shift, const Use& use) {
  if constexpr (kBit == 0) {
    use(std::integral_constant<int, kKnown>{});
  } else {
    if ((shift & kBit) != 0)
      with_known_shift<kBit / 2, kKnown + kBit>(shift, use);
    else
      with_known_shift<kBit / 2, kKnown>(shift, use);
  }
}

// A lane's window where taps are few: all of it in registers.
template <class E>
struct FewTaps {
  float value[3 * kEight];

  CK_DEVICE FewTaps(char* row, int lane_chunk, const TimeTiles& g) {
    read_chunk<E>(row, lane_chunk, value);
    read_chunk<E>(row, lane_chunk + 1, value + kEight);
    if (g.chunks > 1) read_chunk<E>(row, lane_chunk + 2, value + 2 * kEight);
  }

  // Calls use(j, element, window) for each tap j, which reads window[i] for output i, an element of the first one's.
  template <class Use>
  CK_DEVICE void for_each(const TimeTiles& g, const Use& use) const {
    const int taps = static_cast<int>(g.taps.taps);
    with_known_shift(g.shift, [&](auto shift) {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (j > 0 && j >= taps) break;
        use(j, decltype(shift)::value + j, value + decltype(shift)::value + j);
      }
    });
  }
};

}  // namespace ck::cuda
