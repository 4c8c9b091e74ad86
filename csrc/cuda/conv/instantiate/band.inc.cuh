// Included once per type, with CK_TYPE defined.
#include "csrc/common/switch.h"
#include "csrc/cuda/conv/band_backward.cuh"
#include "csrc/cuda/conv/band_forward.cuh"
#include "csrc/cuda/conv/families.h"

namespace ck::cuda {

inline dim3 band_blocks(const Problem& p, const Plan& plan, const BandShape& shape) {
  return dim3(static_cast<unsigned>(ceil_div(p.heads * shape.pieces, plan.units) * plan.groups * p.owners()));
}

// run(whether there is a gate, channels of a row in shared memory), of the kinds that there are.
template <class T, class Run>
const char* with_width(bool gate, int width, const Run& run) {
  return with_bool(gate, [&](auto gated) -> const char* {
    constexpr bool kGate = decltype(gated)::value;
    if constexpr (band_parts(std::is_same_v<T, f16>, kGate) == 1)
      if (width == 64) return run(gated, std::integral_constant<int, 64>{});
    return run(gated, std::integral_constant<int, 32>{});
  });
}

template <class T>
const char* BandFamily<T>::forward(const Forward& p, const Plan& plan, Stream stream) {
  const BandShape shape = band_shape(p);
  return with_width<T>(p.gate.data != nullptr, shape.width, [&](auto gated, auto width) {
    return with_bool(p.per_position, [&](auto own) {
      constexpr int kWidth = decltype(width)::value;
      constexpr bool kGate = decltype(gated)::value, kOwn = decltype(own)::value;
      return launch(p.finishes() ? band_forward_finished<T, kWidth, kGate, kOwn> : band_forward<T, kWidth, kGate, kOwn>,
                    band_blocks(p, plan, shape), dim3(static_cast<unsigned>(32 * plan.units)),
                    static_cast<size_t>(plan.shared_bytes), stream, p, plan.groups);
    });
  });
}

template <class T>
const char* BandFamily<T>::backward(const Backward& p, const Plan& plan, Stream stream) {
  const BandShape shape = band_shape(p);
  const char* status = with_width<T>(p.gate.data != nullptr, shape.width, [&](auto gated, auto width) {
    const auto run = [&](auto own, auto steps) {
      return launch(band_backward<T, decltype(width)::value, decltype(gated)::value, decltype(own)::value,
                                  decltype(steps)::value>,
                    band_blocks(p, plan, shape), dim3(static_cast<unsigned>(32 * plan.units)),
                    static_cast<size_t>(plan.shared_bytes), stream, p);
    };
    using Few = std::integral_constant<int, kBandShortSteps>;
    if (p.per_position) return run(Bool<true>{}, Few{});
    if (shape.steps <= kBandShortSteps) return run(Bool<false>{}, Few{});
    return run(Bool<false>{}, std::integral_constant<int, kBandSteps>{});
  });
  if (status == nullptr && p.grad_weight != nullptr && !p.per_position)
    status = Reduce<float>::weight(p, shape.pieces, false, stream);
  if (status == nullptr && p.grad_weight != nullptr && p.per_position &&
      !band_whole_heads(shape.pieces, static_cast<int>(plan.units)))
    status = add_pieces(p, shape.pieces, stream);
  if (status == nullptr && p.grad_bias != nullptr) status = Reduce<float>::bias(p, p.owners() * p.groups, stream);
  return status;
}

template struct BandFamily<CK_TYPE>;

}  // namespace ck::cuda
