#include "csrc/cuda/conv/reduce.cuh"

#include "csrc/cuda/conv/families.h"

namespace ck::cuda {

// Threads per head: a few numbers for each, and a tap, up to those of a block; with many more numbers, of a larger one.
static int reduce_lanes(int64_t numbers, int64_t taps) {
  constexpr int kEach = 8;
  int lanes = 1;
  while (lanes < kReduceThreads && (lanes * kEach < numbers || lanes < taps)) lanes *= 2;
  return lanes * kEach < numbers ? kReduceWeightThreads : lanes;
}

template <class C>
const char* Reduce<C>::weight(const Backward& p, int64_t pieces, bool finished, Stream stream) {
  const int lanes = reduce_lanes(p.groups * pieces * p.taps.taps, p.taps.taps), threads = max(lanes, kReduceThreads);
  const int heads = threads / lanes;
  return launch(reduce_weight<C>, dim3(static_cast<unsigned>(ceil_div(p.owners() * p.heads, heads))),
                dim3(static_cast<unsigned>(threads)), static_cast<size_t>(heads * p.taps.taps) * sizeof(C), stream, p,
                lanes, pieces, finished);
}

template <class C>
const char* Reduce<C>::bias(const Backward& p, int64_t rows, Stream stream) {
  return launch(reduce_bias<C>, dim3(static_cast<unsigned>(ceil_div(p.channels, 32))), dim3(kReduceThreads), 0, stream,
                p, rows);
}

const char* add_pieces(const Backward& p, int64_t pieces, Stream stream) {
  return launch(reduce_pieces, dim3(static_cast<unsigned>(ceil_div(p.filters() * p.taps.taps, kReduceThreads))),
                dim3(kReduceThreads), 0, stream, p, pieces);
}

template struct Reduce<float>;
template struct Reduce<double>;

}  // namespace ck::cuda
