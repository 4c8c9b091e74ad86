// What tests of kernels on tiles share: the kernel sets that have any.
#pragma once

#include "csrc/tests/kernel_sets.h"

namespace ck::cpu {

namespace tiles_portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace tiles_avx512 {
extern const Kernels kKernels;
}
#endif

// Tiles emulated on top of different kernels, and tiles of the machine.
inline std::vector<const Kernels*> sets_with_tiles() {
  std::vector<const Kernels*> list = {&tiles_portable::kKernels};
#if defined(__x86_64__)
  if (isa_supported("avx512")) list.push_back(&tiles_avx512::kKernels);
  for (const char* name : {"amx-emulated", "amx"})
    if (isa_supported(name)) list.push_back(&kernels_of(name));
#endif
  return list;
}

inline void serial(int64_t n, ParallelBody body, void* context) { body(0, n, context); }
inline void halves(int64_t n, ParallelBody body, void* context) {
  body(n / 2, n, context);
  body(0, n / 2, context);
}

}  // namespace ck::cpu
