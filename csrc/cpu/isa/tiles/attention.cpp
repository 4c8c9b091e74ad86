// Attention in bfloat16 on tiles.
#include "csrc/cpu/attention/tiles/backward_pass.h"
#include "csrc/cpu/attention/tiles/forward.h"
#include "csrc/cpu/isa/tiles/kernels.h"

namespace ck::cpu::CK_ISA {

// A few queries are not worth operands of the keys, and no table is larger than a cache.
static bool serves(const AttentionProblem& p) {
  constexpr int64_t kFewestQueries = 5, kMostColumns = 4096;
  return p.dtype == Dtype::kBFloat16 && p.batch > 0 && p.queries >= kFewestQueries && p.keys > 0 &&
         (!p.has_columns() || p.window() <= kMostColumns);
}

const char* attention_forward(const AttentionForward& p) {
  return serves(p) ? tiled_attention_forward<Machine>(p) : CK_BASE::attention_forward(p);
}

// Sums for the columns of all keys have to fit into memory.
const char* attention_backward(const AttentionBackward& p) {
  constexpr int64_t kMostSums = 1 << 22;
  return serves(p) && (p.key_rel.data == nullptr || p.keys * p.window() <= kMostSums)
             ? tiled_attention_backward<Machine>(p)
             : CK_BASE::attention_backward(p);
}

}  // namespace ck::cpu::CK_ISA
