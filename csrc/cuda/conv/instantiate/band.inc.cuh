// Included once per type, with CK_TYPE defined.
#include "csrc/common/switch.h"
#include "csrc/cuda/conv/band_backward.cuh"
#include "csrc/cuda/conv/families.h"

namespace ck::cuda {

inline dim3 band_blocks(const Problem& p, int parts, int64_t groups) {
  return dim3(static_cast<unsigned>(p.heads * band_pieces(p.head_channels(), parts) * groups * p.owners()));
}

template <class T>
const char* BandFamily<T>::forward(const Forward& p, const Plan& plan, Stream stream) {
  return with_bool(p.gate.data != nullptr, [&](auto gate) {
    using Feed = BandFeed<T, decltype(gate)::value, true>;
    return launch(band_forward<T, decltype(gate)::value>, band_blocks(p, Feed::kParts, plan.groups), dim3(kBandThreads),
                  static_cast<size_t>(plan.shared_bytes), stream, p, plan.groups);
  });
}

template <class T>
const char* BandFamily<T>::backward(const Backward& p, const Plan& plan, Stream stream) {
  int parts = 0;
  const char* status = with_bool(p.gate.data != nullptr, [&](auto gate) {
    return with_bool(p.taps.taps <= kBandShort, [&](auto few) {
      constexpr bool kGate = decltype(gate)::value;
      constexpr int kSteps = decltype(few)::value ? kBandShortSteps : kBandSteps;
      parts = BandFeed<T, kGate, false>::kParts;
      return launch(band_backward<T, kSteps, kGate>, band_blocks(p, parts, plan.groups), dim3(kBandThreads),
                    static_cast<size_t>(plan.shared_bytes), stream, p);
    });
  });
  if (status == nullptr && p.grad_weight != nullptr)
    status = Reduce<float>::weight(p, band_pieces(p.head_channels(), parts), false, stream);
  if (status == nullptr && p.grad_bias != nullptr) status = Reduce<float>::bias(p, p.owners() * p.groups, stream);
  return status;
}

template struct BandFamily<CK_TYPE>;

}  // namespace ck::cuda
