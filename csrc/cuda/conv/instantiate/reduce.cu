#include "csrc/cuda/conv/reduce.cuh"

#include "csrc/cuda/conv/families.h"

namespace ck::cuda {

template <class C>
const char* Reduce<C>::weight(const Backward& p, int64_t pieces, bool finished, Stream stream) {
  return launch(reduce_weight<C>, dim3(static_cast<unsigned>(p.owners() * p.heads)), dim3(kReduceWeightThreads),
                static_cast<size_t>(p.taps.taps) * sizeof(C), stream, p, pieces, finished);
}

template <class C>
const char* Reduce<C>::bias(const Backward& p, int64_t rows, Stream stream) {
  return launch(reduce_bias<C>, dim3(static_cast<unsigned>(ceil_div(p.channels, 32))), dim3(kReduceThreads), 0, stream,
                p, rows);
}

template <class C>
const void* Reduce<C>::sample() {
  return reinterpret_cast<const void*>(reduce_bias<C>);
}

const char* add_pieces(const Backward& p, int64_t pieces, Stream stream) {
  return launch(reduce_pieces, dim3(static_cast<unsigned>(ceil_div(p.filters() * p.taps.taps, kReduceThreads))),
                dim3(kReduceThreads), 0, stream, p, pieces);
}

template struct Reduce<float>;
template struct Reduce<double>;

}  // namespace ck::cuda
