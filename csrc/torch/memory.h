// What large fresh outputs cost is mostly page faults. Ask for huge pages where memory is not mapped yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "csrc/common/poison.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ck {

inline void poison(void* data, size_t bytes) {
  if (bytes > 0 && poisoned()) std::memset(data, 0xff, bytes);
}

// Returns whether the pages of [data, data + bytes) are mapped already, judged by three of them.
inline bool prepare_output(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLarge = 4u << 20, kHugePage = 2u << 20;
  if (bytes < kLarge) return true;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(data);
  const auto resident = [&](size_t offset) {
    unsigned char state = 0;
    void* const address = reinterpret_cast<void*>((start + offset) / page * page);
    return mincore(address, 1, &state) == 0 && (state & 1) != 0;
  };
  if (resident(bytes / 4) && resident(bytes / 2) && resident(bytes - bytes / 8)) return true;
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage,
                  last = (start + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return false;
#else
  (void)data;
  (void)bytes;
  return true;
#endif
}

}  // namespace ck
