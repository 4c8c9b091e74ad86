// Attention. Only the type of accumulation is known at compile time.
#include "csrc/cpu/attention/backward.h"
#include "csrc/cpu/attention/forward.h"
#include "csrc/cpu/isa/kernels.h"

namespace ck::cpu::CK_ISA {

const char* attention_forward(const AttentionForward& p) {
  return p.dtype == Dtype::kFloat64 ? attention_forward_typed<double>(p) : attention_forward_typed<float>(p);
}

const char* attention_backward(const AttentionBackward& p) {
  return p.dtype == Dtype::kFloat64 ? attention_backward_typed<double>(p) : attention_backward_typed<float>(p);
}

}  // namespace ck::cpu::CK_ISA
