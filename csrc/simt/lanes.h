// What the collectives of a warp are written with.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "csrc/simt/block.h"

namespace ck::simt {

template <class Operand, class Body>
void for_each_lane(void* const* operands, unsigned lanes, Body body) {
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    body(lane, *static_cast<Operand*>(operands[lane]));
  }
}

// The operand of the first lane. Fails unless all have the same.
template <class Operand>
const Operand& agreed(const char* what, void* const* operands, unsigned lanes) {
  const Operand& first = *static_cast<const Operand*>(operands[std::countr_zero(lanes)]);
  for_each_lane<const Operand>(operands, lanes, [&](int lane, const Operand& own) {
    if (!(own == first))
      fail(std::string(what) + ": lane " + std::to_string(lane) + " has other operands than the first of its warp");
  });
  return first;
}

inline float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline float from_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, size = (bits & 0x7fff) << 13;
  // Shifting the exponent by a product handles subnormal numbers too; infinities and NaN keep the largest exponent.
  const float value =
      (bits & 0x7c00) == 0x7c00 ? std::bit_cast<float>(size | 0x7f800000u) : std::bit_cast<float>(size) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

}  // namespace ck::simt
