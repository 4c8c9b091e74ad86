#define CK_ISA avx512
#define CK_VECTOR_BYTES 64
#include "csrc/cpu/kernels.inc.h"

namespace ck::cpu {

extern const Kernels kKernels_avx512;
const Kernels kKernels_avx512 = {"avx512",          avx512::forward,           avx512::backward, avx512::shift_state,
                                 avx512::attention, avx512::attention_backward};

}  // namespace ck::cpu
