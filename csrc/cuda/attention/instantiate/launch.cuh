// Launches of attention's kernels.
#pragma once

#include <type_traits>

#include "csrc/cuda/device/primitives.cuh"

namespace ck::cuda {

// Nothing to do is no error.
template <class Kernel, class... Arguments>
const char* launch_blocks(Kernel kernel, int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
                          const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "attention: too many blocks";
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                static_cast<size_t>(shared_bytes), stream, arguments...);
}

// Calls body with the template argument of a kernel for so many channels: kSize, kSize + 64, ... kMost.
template <int kMost = 128, int kSize = 64, class Body>
const char* with_channels(int64_t channels, const Body& body) {
  if constexpr (kSize == kMost)
    return body(std::integral_constant<int, kSize>{});
  else
    return channels <= kSize ? body(std::integral_constant<int, kSize>{})
                             : with_channels<kMost, kSize + 64>(channels, body);
}

}  // namespace ck::cuda
