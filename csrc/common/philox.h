// Philox4x32-10 (Salmon et al. 2011), the counter-based generator behind weight dropout.
// The mask of weight element (b, t, h, j) depends on the seed and on these coordinates only, so that every backend, the
// forward and the backward pass, and every way of splitting the work draw the same mask.
#pragma once

#include <cstdint>

#include "taps.h"

namespace ck {

struct PhiloxBlock {
  uint32_t word[4];
};

CK_HD PhiloxBlock philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Random words of taps 4*quad .. 4*quad+3 of weight row (b, t, h).
CK_HD PhiloxBlock tap_words(uint64_t seed, int64_t b, int64_t t, int64_t h, int64_t quad) {
  return philox4x32(static_cast<uint32_t>(t), static_cast<uint32_t>(b), static_cast<uint32_t>(h),
                    static_cast<uint32_t>(quad), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// An element is kept iff its word is >= this. 2^32 (everything dropped) needs the 64-bit type.
CK_HD uint64_t drop_threshold(double probability) { return static_cast<uint64_t>(probability * 4294967296.0); }

}  // namespace ck
