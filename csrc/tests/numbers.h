// What tests of tiles make of numbers: their bits, a sequence that every machine draws alike, and hashes.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/common/dtypes.h"

namespace ck::cpu {

inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float number(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float number(bf16 h) { return number(uint32_t{h.bits} << 16); }
// The upper half, which is all of a number of few bits.
inline bf16 upper_half(float f) { return {static_cast<uint16_t>(bits_of(f) >> 16)}; }

constexpr uint64_t kFirstState = 88172645463325252ull;
inline uint64_t state = kFirstState;
inline uint64_t draw() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
// From -3 to 3, mostly in the middle, from integers alone.
inline float value() {
  int sum = -510;
  for (uint64_t r = draw() & 0xffffffffu; r != 0; r >>= 8) sum += static_cast<int>(r & 255);
  return static_cast<float>(sum) / 170.0f;
}

// FNV-1a, of bytes in the order of the lowest first.
struct Hash {
  uint64_t value = 1469598103934665603ull;
  void add(uint32_t x, int bytes) {
    for (int n = 0; n < bytes; ++n) value = (value ^ (x >> 8 * n & 255)) * 1099511628211ull;
  }
};
// Of lists of rows, then of lists of numbers.
template <class Rows, class Numbers>
uint64_t hash_of(const Rows& rows, const Numbers& numbers) {
  Hash hash;
  for (const auto& part : rows)
    for (const bf16 x : part) hash.add(x.bits, 2);
  for (const auto& part : numbers)
    for (const float x : part) hash.add(bits_of(x), 4);
  return hash.value;
}

}  // namespace ck::cpu
