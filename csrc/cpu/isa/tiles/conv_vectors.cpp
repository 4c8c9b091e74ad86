// What vectors compute beside tiles: rows that meet a NaN or an infinity, filters that bands cannot hold, the rest of a
// tile.
#include "csrc/cpu/conv/convolve_tiles.h"
#include "csrc/cpu/conv/correlate_tiles.h"

namespace ck::cpu::CK_ISA {

template struct Convolve<Lanes<bf16>, SharedTaps<float>>;
template struct Convolve<Lanes<bf16>, PositionTaps<float>>;
template struct Correlate<Lanes<bf16>>;

}  // namespace ck::cpu::CK_ISA
