// What each instruction set exports. Included once by every file of isa/.
#pragma once

#include "csrc/cpu/attention/backward.h"
#include "csrc/cpu/attention/forward.h"
#include "csrc/cpu/conv/backward.h"
#include "csrc/cpu/conv/forward.h"
#include "csrc/cpu/conv/step.h"
#include "csrc/cpu/kernels.h"

namespace ck::cpu::CK_ISA {

inline const char* forward(const Forward& p) {
  switch (p.dtype) {
    case Dtype::kFloat64: return forward_typed<double>(p);
    case Dtype::kFloat32: return forward_typed<float>(p);
    case Dtype::kBFloat16: return forward_typed<bf16>(p);
    case Dtype::kFloat16: return forward_typed<f16>(p);
  }
  return "unknown dtype";
}

inline const char* backward(const Backward& p) {
  switch (p.dtype) {
    case Dtype::kFloat64: return backward_typed<double>(p);
    case Dtype::kFloat32: return backward_typed<float>(p);
    case Dtype::kBFloat16: return backward_typed<bf16>(p);
    case Dtype::kFloat16: return backward_typed<f16>(p);
  }
  return "unknown dtype";
}

inline const char* shift_state(const Forward& p, void* state) {
  switch (p.dtype) {
    case Dtype::kFloat64: return shift_state_typed(p, static_cast<double*>(state));
    case Dtype::kFloat32: return shift_state_typed(p, static_cast<float*>(state));
    case Dtype::kBFloat16: return shift_state_typed(p, static_cast<bf16*>(state));
    case Dtype::kFloat16: return shift_state_typed(p, static_cast<f16*>(state));
  }
  return "unknown dtype";
}

inline const char* attention(const AttentionForward& p) {
  return p.dtype == Dtype::kFloat64 ? attention_typed<double>(p) : attention_typed<float>(p);
}

inline const char* attention_backward(const AttentionBackward& p) {
  return p.dtype == Dtype::kFloat64 ? attention_backward_typed<double>(p) : attention_backward_typed<float>(p);
}

}  // namespace ck::cpu::CK_ISA
