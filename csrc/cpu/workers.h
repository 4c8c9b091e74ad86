// The threads of the caller.
#pragma once

#include <cstdint>

namespace ck::cpu {

// Runs body(begin, end, context) over disjoint ranges that cover [0, n), possibly on several threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, ParallelBody body, void* context);

struct Workers {
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

}  // namespace ck::cpu
