// What a CPU kernel of attention is asked to do.
#pragma once

#include "csrc/common/attention.h"
#include "csrc/cpu/workers.h"

namespace ck::cpu {

struct AttentionProblem : ck::Attention, Workers {
  // sequences+1 packed offsets of queries and of keys, nullptr: every batch row is one sequence
  const int64_t *query_offsets = nullptr, *key_offsets = nullptr;
  uint64_t seed = 0;
};

struct AttentionForward : AttentionProblem {
  HeadRows out;
  HeadScalars lse;
};

struct AttentionBackward : AttentionProblem, AttentionGradients {};

}  // namespace ck::cpu
