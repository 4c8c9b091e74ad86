// The tiles of the convolution for float16 rows that are read in place.
#include "csrc/cpu/conv/convolve_tiles.h"

namespace ck::cpu::CK_ISA {

#if CK_VECTOR_BYTES > 16
CK_INSTANTIATE_CONVOLVE(Lanes<f16>);
#endif

}  // namespace ck::cpu::CK_ISA
