// Sums and maxima over the lanes of a warp. All lanes take part, and each gets the result of its group.
#pragma once

#include "csrc/cuda/device/numbers.cuh"

namespace ck::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class C>
CK_DEVICE C lane_sum(C value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Over groups of `width` lanes, a power of two.
template <class C>
CK_DEVICE C lane_sum(C value, int width) {
#pragma unroll 1
  for (int distance = width / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <class C>
CK_DEVICE C lane_max(C value) {
  for (int distance = 16; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

}  // namespace ck::cuda
