// The tiles of the gradient of the filters.
#include "csrc/cpu/conv/correlate_tiles.h"

namespace ck::cpu::CK_ISA {

template struct Correlate<Lanes<double>>;
template struct Correlate<Lanes<float>>;
template struct Correlate<Converted<bf16>>;
#if CK_VECTOR_BYTES > 16
template struct Correlate<Lanes<bf16>>;
template struct Correlate<Lanes<f16>>;
#endif

}  // namespace ck::cpu::CK_ISA
