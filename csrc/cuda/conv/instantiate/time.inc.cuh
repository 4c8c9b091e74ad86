// Included once per type, with CK_TYPE defined.
#include "csrc/common/switch.h"
#include "csrc/cuda/conv/families.h"
#include "csrc/cuda/conv/time_backward.cuh"

namespace ck::cuda {

// `items`: how many warps have work.
template <class Kernel, class... Arguments>
const char* launch_time(Kernel kernel, const TimeTiles& g, int64_t items, Stream stream,
                        const Arguments&... arguments) {
  return launch(kernel, dim3(static_cast<unsigned>(ceil_div(items, kTimeWarps))), dim3(32 * kTimeWarps),
                static_cast<size_t>(g.mask_bytes() + kTimeWarps * g.warp_bytes), stream, arguments...);
}

// Calls run(Bool): whether tiles come by bulk copies, as the plan says where they can.
template <class T, bool kPossible, class Run>
const char* with_copies(const Plan& plan, const Run& run) {
  if constexpr (kPossible && sizeof(T) == 2)
    return with_bool(plan.bulk, run);
  else
    return run(Bool<false>{});
}

template <class T>
const char* TimeFamily<T>::forward(const Forward& p, const Plan& plan, Stream stream) {
  return with_bool(p.gate.data != nullptr || p.mask != nullptr, [&](auto ready) {
    return with_bool(p.offsets != nullptr, [&](auto packed) {
      constexpr bool kReady = decltype(ready)::value, kPacked = decltype(packed)::value;
      return with_copies<T, !kReady>(plan, [&](auto bulk) {
        constexpr bool kBulk = decltype(bulk)::value;
        const TimeTiles g =
            forward_tiles(p.taps, p.time, p.channels, sizeof(T), kReady, kBulk, plan.shared_bytes / kTimeWarps);
        const int64_t items = g.channel_blocks(p.channels) * plan.groups * p.owners();
        return launch_time(
            p.finishes() ? time_forward_finished<T, kReady, kPacked, kBulk> : time_forward<T, kReady, kPacked, kBulk>,
            g, items, stream, p, g, plan.groups);
      });
    });
  });
}

template <class T>
const char* TimeFamily<T>::backward(const Backward& p, const Plan& plan, Stream stream) {
  const Taps taps = p.taps.transposed();
  const auto run = [&](auto kernel, int chunks, bool bulk) {
    const TimeTiles g = backward_tiles(taps, p.time, p.channels, sizeof(T), p.gate.data != nullptr, bulk,
                                       plan.shared_bytes / kTimeWarps);
    const int64_t windows = p.grad_weight != nullptr ? ceil_div(g.chunks, chunks) : 1;
    const int64_t items = g.channel_blocks(p.channels) * windows * plan.groups * p.owners();
    return launch_time(kernel, g, items, stream, p, g, windows);
  };
  const char* status = with_bool(p.offsets != nullptr, [&](auto packed) {
    return with_copies<T, true>(plan, [&](auto bulk) {
      constexpr bool kPacked = decltype(packed)::value, kBulk = decltype(bulk)::value;
      return few_chunks(taps) ? run(time_backward<T, kPacked, kTimeFewChunks, kBulk>, kTimeFewChunks, kBulk)
                              : run(time_backward<T, kPacked, kTimeManyChunks, kBulk>, kTimeManyChunks, kBulk);
    });
  });
  if (status == nullptr && p.grad_weight != nullptr)
    status = Reduce<float>::weight(p, p.head_channels(), false, stream);
  if (status == nullptr && p.grad_bias != nullptr) status = Reduce<float>::bias(p, p.owners() * p.groups, stream);
  return status;
}

template struct TimeFamily<CK_TYPE>;

}  // namespace ck::cuda
