// Included once per type, with CK_TYPE defined.
#include "csrc/common/switch.h"
#include "csrc/cuda/conv/families.h"
#include "csrc/cuda/conv/stream_backward.cuh"

namespace ck::cuda {

template <class T>
const char* StreamFamily<T>::forward(const Forward& p, const Plan& plan, Stream stream) {
  const int64_t blocks = ceil_div(p.channels, kLaneRow) * plan.groups * p.owners();
  return with_bool(p.head_channels() % kQuad == 0, [&](auto shared) {
    return with_bool(p.gate.data != nullptr, [&](auto gate) {
      constexpr bool kShared = decltype(shared)::value, kGate = decltype(gate)::value;
      return launch(p.finishes() ? stream_forward_finished<T, kShared, kGate> : stream_forward<T, kShared, kGate>,
                    dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads), static_cast<size_t>(plan.shared_bytes),
                    stream, p, plan.groups);
    });
  });
}

template <class T>
const char* StreamFamily<T>::backward(const Backward& p, const Plan& plan, Stream stream) {
  const int64_t blocks = ceil_div(p.channels, kLaneRow) * plan.groups * p.owners();
  const bool shared_filter = p.head_channels() % kQuad == 0;
  const char* status = with_bool(shared_filter, [&](auto shared) {
    return with_bool(p.taps.taps <= kFewTaps, [&](auto few) {
      return launch(stream_backward<T, decltype(shared)::value, decltype(few)::value>,
                    dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads), static_cast<size_t>(plan.shared_bytes),
                    stream, p);
    });
  });
  if (status == nullptr && p.grad_weight != nullptr)
    status = Reduce<float>::weight(p, p.head_channels() / (shared_filter ? kQuad : 1), false, stream);
  if (status == nullptr && p.grad_bias != nullptr) status = Reduce<float>::bias(p, p.owners() * p.groups, stream);
  return status;
}

template struct StreamFamily<CK_TYPE>;

}  // namespace ck::cuda
