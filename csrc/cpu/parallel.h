// Runs work on several threads.
#pragma once

#include "csrc/cpu/workers.h"

namespace ck::cpu::CK_ISA {

template <class Body>
inline void parallel(const Workers& p, int64_t n, bool worthwhile, const Body& body) {
  if (!worthwhile || p.threads == 1 || n <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  p.parallel_for(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace ck::cpu::CK_ISA
