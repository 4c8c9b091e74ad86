// Dropout: one random word of a block of four for each element.
#pragma once

#include "csrc/common/philox.h"
#include "csrc/cuda/device/numbers.cuh"

namespace ck::cuda {

// words[index], selected: registers have no index.
CK_DEVICE uint32_t select_word(const uint32_t (&words)[4], int index) {
  const uint32_t low = index % 2 == 0 ? words[0] : words[1], high = index % 2 == 0 ? words[2] : words[3];
  return index < 2 ? low : high;
}

// The multiplier of the element with word index % 4 of a block; p: Problem or Attention.
template <class C, class P>
CK_DEVICE C keep_factor(const P& p, const PhiloxBlock& block, int64_t index) {
  return select_word(block.word, static_cast<int>(index % 4)) >= p.drop_below ? static_cast<C>(p.keep_scale) : C{0};
}

}  // namespace ck::cuda
