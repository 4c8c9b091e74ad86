// What tests of the CPU kernels share: the instruction sets to run, and a way to cut the work.
#pragma once

#include <string>
#include <vector>

#include "csrc/cpu/dispatch.h"

namespace ck::cpu {

#ifdef CK_WIDE
namespace wide {
extern const Kernels kKernels;
}
#endif

// All that run here, the portable ones too; vectors of 64 bytes on any machine.
inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> list;
#ifdef CK_WIDE
  list.push_back(&wide::kKernels);
#endif
  for (const std::string& name : compiled_isas())
    if (isa_supported(name)) list.push_back(&kernels_of(name));
  return list;
}

// Cuts the work into single pieces, last first: nothing may depend on their order.
inline void scattered(int64_t n, ParallelBody body, void* context) {
  for (int64_t i = n - 1; i >= 0; --i) body(i, i + 1, context);
}

}  // namespace ck::cpu
