// The tiles of the convolution for float64 and float32, and for float16 where its rows are converted first.
#include "csrc/cpu/conv/convolve_tiles.h"

namespace ck::cpu::CK_ISA {

CK_INSTANTIATE_CONVOLVE(Lanes<double>);
CK_INSTANTIATE_CONVOLVE(Lanes<float>);

}  // namespace ck::cpu::CK_ISA
