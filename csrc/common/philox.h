// Philox4x32-10 (Salmon et al. 2011), the counter-based generator behind weight dropout.
// The mask of weight element (b, t, h, j) depends on the seed and on these coordinates only, so that every backend, the
// forward and the backward pass, and every way of splitting the work draw the same mask.
#pragma once

#include <cstdint>

#include "csrc/common/taps.h"

namespace ck {

struct PhiloxBlock {
  uint32_t word[4];
};

// The two halves of factor * word.
struct WordProduct {
  CK_HD void operator()(uint32_t factor, uint32_t word, uint32_t& high, uint32_t& low) const {
    const uint64_t product = uint64_t{factor} * word;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Word: uint32_t, or vectors of them, which hold the counters of several blocks.
template <class Word, class Product>
CK_HD void philox_rounds(Word& c0, Word& c1, Word& c2, Word& c3, uint32_t k0, uint32_t k1, const Product& product) {
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    product(0xD2511F53u, c0, high0, low0);
    product(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

CK_HD PhiloxBlock philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  philox_rounds(c0, c1, c2, c3, k0, k1, WordProduct{});
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
