// Included once per type, with CK_TYPE defined.
#include "../families.h"
#include "../rows.cuh"

namespace ck::cuda {

template <class T>
const char* PerRow<T>::forward(const Forward& p, const Plan& plan, Stream stream) {
  const int64_t blocks = ceil_div(p.channels, kLaneRow) * plan.groups * p.owners();
  return with_bool(p.gate.data != nullptr, [&](auto gate) {
    return launch(rows_forward<T, decltype(gate)::value>, dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads),
                  static_cast<size_t>(plan.shared_bytes), stream, p, plan.groups);
  });
}

template <class T>
const char* PerRow<T>::backward(const Backward& p, const Plan& plan, Stream stream) {
  const int64_t blocks = ceil_div(p.channels, kLaneRow) * plan.groups * p.owners();
  const char* status = with_bool(p.gate.data != nullptr, [&](auto gate) {
    return launch(rows_backward<T, decltype(gate)::value>, dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads),
                  static_cast<size_t>(plan.shared_bytes), stream, p);
  });
  if (status == nullptr && p.grad_bias != nullptr) status = Reduce<float>::bias(p, p.owners() * p.groups, stream);
  return status;
}

template struct PerRow<CK_TYPE>;

}  // namespace ck::cuda
