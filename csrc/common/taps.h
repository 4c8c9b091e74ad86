// The one index relation of the package, on host and device:
//   output t, tap j  reads  input s = t + dilation * j - left,     j = 0 .. taps-1.
// Nothing else in csrc/ does this arithmetic. The Python reference and the Triton backend state it once each; a table
// test pins the three together.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CK_HD __host__ __device__ __forceinline__
#else
#define CK_HD inline __attribute__((always_inline))
#endif

namespace ck {

// The greatest dilation, and span: positions near them fit into 32 bits.
constexpr int64_t kFarthest = int64_t{1} << 30;

struct Taps {
  int64_t taps;
  int64_t left;
  int64_t dilation;

  // Distance between the first and the last input that one output reads.
  CK_HD int64_t span() const { return dilation * (taps - 1); }

  CK_HD int64_t source(int64_t t, int64_t j) const { return t + dilation * j - left; }

  CK_HD int64_t target(int64_t s, int64_t j) const { return s - dilation * j + left; }

  // The relation that d(input) obeys: the same form with the taps in reverse order.
  CK_HD Taps transposed() const { return {taps, span() - left, dilation}; }

  // Taps [first, last) of output t whose source lies in [begin, end).
  CK_HD int64_t first_inside(int64_t t, int64_t begin) const {
    const int64_t gap = begin - source(t, 0);
    const int64_t j = gap <= 0 ? 0 : (gap + dilation - 1) / dilation;
    return j < taps ? j : taps;
  }
  CK_HD int64_t last_inside(int64_t t, int64_t end) const {
    const int64_t gap = end - source(t, 0);
    const int64_t j = gap <= 0 ? 0 : (gap + dilation - 1) / dilation;
    return j < taps ? j : taps;
  }
};

}  // namespace ck
