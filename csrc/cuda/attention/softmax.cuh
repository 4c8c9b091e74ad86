// The steps of the online softmax.
#pragma once

#include "csrc/cuda/attention/scores.cuh"

namespace ck::cuda {

// One step of the online softmax, for 16 queries and a tile of keys: from products s to exp2(score - maximum), which
// are added to total after that has been scaled by `shrink`, like everything that was summed before. Returns whether
// some maximum grows.
template <int kX>
CK_DEVICE bool update_softmax(float (&s)[kX][4], const ScoreTerms& terms, float (&top)[2], float (&total)[2],
                              float (&shrink)[2]) {
  bool grows = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = -infinity<float>();
#pragma unroll
    for (int x = 0; x < kX; ++x) highest = fmaxf(highest, fmaxf(s[x][2 * half], s[x][2 * half + 1]));
    highest = row_max(highest);
    const float now = fmaxf(top[half], highest * terms.factor + terms.added[half]);
    const float shift = now == -infinity<float>() ? 0.0f : now;
    const float constant = terms.added[half] - shift;
    shrink[half] = fast_exp2(top[half] - shift);
    grows = grows || now > top[half];
    top[half] = now;
    float sum = 0;
#pragma unroll
    for (int x = 0; x < kX; ++x)
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[x][e] = fast_exp2(s[x][e] * terms.factor + constant);
        sum += s[x][e];
      }
    total[half] = total[half] * shrink[half] + sum;
  }
  return grows;
}

}  // namespace ck::cuda
