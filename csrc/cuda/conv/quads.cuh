// Four adjacent channels of a row in a thread's registers: a quad, and runs of kRun rows of quads.
#pragma once

#include <type_traits>

#include "csrc/cuda/conv/plan.h"
#include "csrc/cuda/device/reduce.cuh"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

struct Quad {
  float v[kQuad];
};

CK_DEVICE Quad load_quad(const float* from) {
  const float4 q = *reinterpret_cast<const float4*>(from);
  return {{q.x, q.y, q.z, q.w}};
}
template <class T>
CK_DEVICE Quad load_quad(const T* from) {
  const uint2 q = *reinterpret_cast<const uint2*>(from);
  // Not by unpack(): nvcc 13.0 makes more instructions of that in the loops over taps.
  const auto half = [](uint32_t bits) { return widen(T{static_cast<uint16_t>(bits)}); };
  return {{half(q.x), half(q.x >> 16), half(q.y), half(q.y >> 16)}};
}

// Words of a quad as elements of T.
template <class T>
constexpr int kQuadWords = kQuad / kPerWord<T>;

// The first `count` channels of a quad of a row in global memory, in pieces of `bytes`, and zeros.
template <class T>
CK_DEVICE Quad load_quad(const T* from, int count, int bytes) {
  uint32_t words[kQuadWords<T>];
  load_pieces(words, from, count, bytes);
  Quad q;
  unpack<T>(q.v, words);
  return q;
}

CK_DEVICE void add_product(Quad& sum, const Quad& a, const Quad& b) {
#pragma unroll
  for (int e = 0; e < kQuad; ++e) sum.v[e] += a.v[e] * b.v[e];
}

CK_DEVICE void store_quad(float* to, const Quad& q) {
  *reinterpret_cast<float4*>(to) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
}

// Whether 0 <= t < time.
CK_DEVICE bool within(int64_t t, int64_t time) { return static_cast<uint64_t>(t) < static_cast<uint64_t>(time); }

// Stores the rows of a run, 16 bytes at a time. to: where channel 0 of the lane's row of channels lies in row 0, which
// is at position t; rows are `dilation` positions, or `stride` elements, apart, and those at 0 .. time - 1 exist.
// `channels`: how many of a row exist, a multiple of kVector<T>. One address is found and moved on: 64-bit products for
// every row would take longer than all else.
CK_DEVICE void store_vectors(const Quad (&run)[kRun], int lane, int64_t channels, float* to, int64_t stride, int64_t t,
                             int64_t time, int64_t dilation) {
  if (lane * kQuad >= channels) return;
  to += lane * kQuad;
#pragma unroll
  for (int i = 0; i < kRun; ++i, to += stride, t += dilation)
    if (within(t, time)) store_four(to, run[i].v[0], run[i].v[1], run[i].v[2], run[i].v[3]);
}
// Two lanes exchange halves, so that each has 8 channels of half of the rows.
template <class T>
CK_DEVICE void store_vectors(const Quad (&run)[kRun], int lane, int64_t channels, T* to, int64_t stride, int64_t t,
                             int64_t time, int64_t dilation) {
  const bool odd = lane % 2 != 0;
  const int first_channel = lane / 2 * 2 * kQuad;
  to += first_channel + (odd ? kRun / 2 * stride : 0);
  t += odd ? kRun / 2 * dilation : 0;
  if (first_channel >= channels) time = 0;
#pragma unroll
  for (int i = 0; i < kRun / 2; ++i, to += stride, t += dilation) {
    const Quad &low = run[i], &high = run[i + kRun / 2];
    const uint2 first = make_uint2(narrow_pair<T>(low.v[0], low.v[1]), narrow_pair<T>(low.v[2], low.v[3]));
    const uint2 second = make_uint2(narrow_pair<T>(high.v[0], high.v[1]), narrow_pair<T>(high.v[2], high.v[3]));
    const uint2 keep = odd ? second : first, give = odd ? first : second;
    const uint32_t x = __shfl_xor_sync(kAllLanes, give.x, 1), y = __shfl_xor_sync(kAllLanes, give.y, 1);
    if (within(t, time))
      *reinterpret_cast<uint4*>(to) = odd ? make_uint4(x, y, keep.x, keep.y) : make_uint4(keep.x, keep.y, x, y);
  }
}

// The same in pieces of `bytes`, of which a quad has one at least.
template <class T>
CK_DEVICE void store_pieces(const Quad (&run)[kRun], int lane, int64_t channels, T* to, int64_t stride, int64_t t,
                            int64_t time, int64_t dilation, int bytes) {
  uint32_t words[kRun][kQuadWords<T>];
#pragma unroll
  for (int i = 0; i < kRun; ++i) pack<T>(words[i], run[i].v);
  const auto store = [&](auto known) {
#pragma unroll
    for (int i = 0; i < kRun; ++i, to += stride, t += dilation)
      if (within(t, time))
        store_pieces(to, words[i], static_cast<int>(channels) - lane * kQuad, decltype(known)::value);
  };
  to += lane * kQuad;
  if (bytes >= 8)
    store(std::integral_constant<int, 8>{});
  else if (bytes == 4)
    store(std::integral_constant<int, 4>{});
  else if constexpr (sizeof(T) == 2)
    store(std::integral_constant<int, 2>{});
}

}  // namespace ck::cuda
