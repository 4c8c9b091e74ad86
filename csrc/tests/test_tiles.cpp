// Products of tiles: what AMX computes, from the emulations in plain C++ and in AVX2, and from the instructions where
// this machine has them.
#include <cmath>
#include <cstdint>
#include <vector>

#include "csrc/tests/check.h"
#include "csrc/tests/numbers.h"
#include "csrc/tests/tile_products.h"

namespace {

using ck::cpu::bits_of;
using ck::cpu::draw;
using ck::cpu::tile_tests;

// The upper half of a number that has no lower one.
uint16_t half(float f) {
  CK_EQUAL(bits_of(f) & 0xffff, 0);
  return static_cast<uint16_t>(bits_of(f) >> 16);
}

struct Tiles {
  alignas(64) uint16_t a[16][32] = {}, b[16][32] = {};
  alignas(64) uint32_t c[16][16] = {};

  // Elements of the matrices: a is [16][32], b is [32][16].
  uint16_t& left(int m, int k) { return a[m][k]; }
  uint16_t& right(int k, int n) { return b[k / 2][2 * n + k % 2]; }
};

// What every machine makes of it must be the same.
uint32_t element(const Tiles& tiles, int m, int n) {
  std::vector<uint32_t> found;
  for (const auto* tests : tile_tests()) {
    Tiles t = tiles;
    tests->product(t.a, t.b, t.c);
    found.push_back(t.c[m][n]);
  }
  for (const uint32_t other : found) CK_EQUAL(other, found[0]);
  return found[0];
}

// Element (3, 5) of a product in which row 3 of a and column 5 of b hold these numbers from k = 0 on.
uint32_t sum_of(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, uint32_t c = 0) {
  Tiles t;
  for (size_t k = 0; k < a.size(); ++k) {
    t.left(3, static_cast<int>(k)) = a[k];
    t.right(static_cast<int>(k), 5) = b[k];
  }
  t.c[3][5] = c;
  return element(t, 3, 5);
}

constexpr uint16_t kOne = 0x3f80;

CK_TEST(small_integers_are_exact) {
  Tiles t;
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 32; ++k) {
      t.left(m, k) = half(static_cast<float>((m * 5 + k * 3) % 17 - 8));
      t.right(k, m) = half(static_cast<float>((m * 7 + k * 11) % 13 - 6));
    }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      t.c[m][n] = bits_of(static_cast<float>(m - n));
      int expected = m - n;
      for (int k = 0; k < 32; ++k) expected += ((m * 5 + k * 3) % 17 - 8) * ((n * 7 + k * 11) % 13 - 6);
      CK_EQUAL(element(t, m, n), bits_of(static_cast<float>(expected)));
    }
}

CK_TEST(even_and_odd_members_have_chains_of_their_own) {
  const uint16_t large = half(0x1p24f), minus = half(-0x1p24f);
  // The chain of the even ones is 2^24, then still 2^24 after 1 has been lost, then 0; the odd one is 1.
  CK_EQUAL(sum_of({large, kOne, kOne, 0, minus}, {kOne, kOne, kOne, 0, kOne}), bits_of(1.0f));
  // All in one chain would lose both.
  CK_EQUAL(sum_of({large, kOne, 0, kOne, minus}, {kOne, kOne, 0, kOne, kOne}), bits_of(2.0f));
}

CK_TEST(the_sum_meets_what_was_there_last) {
  // (2^24 + 1) + 1: the sum of the chains is 2, and reaches 2^24 whole.
  CK_EQUAL(sum_of({kOne, kOne}, {kOne, kOne}, bits_of(0x1p24f)), bits_of(0x1p24f + 2));
  CK_EQUAL(sum_of({kOne}, {kOne}, bits_of(0x1p24f)), bits_of(0x1p24f));  // halfway, to even
}

CK_TEST(products_are_not_rounded_before_they_are_added) {
  const float x = 1.0f + 0x1p-7f;
  // x * x = 1 + 2^-6 + 2^-14; times 2^24 less 2^24 + 2^18: what is left is 2^10.
  CK_EQUAL(sum_of({half(-0x1p24f), 0, half(-0x1p18f), 0, half(x * 0x1p12f)}, {kOne, 0, kOne, 0, half(x * 0x1p12f)}),
           bits_of(0x1p10f));
}

CK_TEST(denormal_numbers_are_zeros) {
  CK_EQUAL(sum_of({0x0001}, {half(0x1p100f)}), 0);
  CK_EQUAL(sum_of({half(0x1p100f)}, {0x807f}), 0);
  CK_EQUAL(sum_of({kOne}, {kOne}, 0x007fffff), bits_of(1.0f));
  CK_EQUAL(sum_of({}, {}, 0x807fffff), 0);                                // -0 + 0
  CK_EQUAL(sum_of({half(0x1p-64f)}, {half(0x1p-63f)}), 0);                // 2^-127
  CK_EQUAL(sum_of({half(0x1p-63f)}, {half(0x1p-63f)}), 0x00800000);       // 2^-126
  CK_EQUAL(sum_of({half(-0x1p-64f)}, {half(0x1p-63f)}, 0x80000000u), 0);  // the chains are -0 and +0
}

CK_TEST(what_is_tiny_shows_after_rounding_to_24_bits) {
  const auto less = [](float x) {  // 2^-126 less x * 2^-151
    return sum_of({half(0x1p-63f), 0, half(x * 0x1p-75f)}, {half(0x1p-63f), 0, half(-0x1p-76f)});
  };
  CK_EQUAL(less(0.5f), 0x00800000);  // nearest to 2^-126 in 24 bits as well
  CK_EQUAL(less(1.5f), 0);           // not there, though it is in 23
}

CK_TEST(infinities) {
  const uint16_t infinity = 0x7f80;
  CK_EQUAL(sum_of({infinity}, {half(-1.0f)}), 0xff800000u);
  CK_EQUAL(sum_of({infinity}, {0}), 0xffc00000u);
  CK_EQUAL(sum_of({infinity, infinity}, {kOne, half(-1.0f)}), 0xffc00000u);
  CK_EQUAL(sum_of({half(0x1p120f), half(0x1p120f)}, {half(0x1p120f), kOne}), 0x7f800000);
  CK_EQUAL(sum_of({kOne}, {kOne}, 0xff800000u), 0xff800000u);
}

CK_TEST(the_first_nan_reaches_the_result_quietly) {
  CK_EQUAL(sum_of({0x7f81}, {0x7f82}), 0x7fc10000);                    // of a before of b
  CK_EQUAL(sum_of({kOne}, {0xff82}), 0xffc20000u);                     // of b
  CK_EQUAL(sum_of({0x7f81, 0, 0x7f83}, {kOne, 0, kOne}), 0x7fc30000);  // a later a before the chain
  CK_EQUAL(sum_of({0x7f81, 0, kOne}, {kOne, 0, kOne}), 0x7fc10000);    // the chain
  CK_EQUAL(sum_of({kOne, 0x7f84}, {kOne, kOne}), 0x7fc40000);          // of the odd members
  CK_EQUAL(sum_of({0x7f81, 0x7f84}, {kOne, kOne}), 0x7fc10000);        // of the even ones before them
  CK_EQUAL(sum_of({0x7f81}, {kOne}, 0xff812345u), 0xffc12345u);        // of c before all
}

CK_TEST(random_products_are_those_of_a_processor) {
  // Recorded on a Xeon with AMX: hashes (FNV-1a) of the results of 200 products each.
  struct Kind {
    bool any_bits;
    uint64_t first_exponent, exponents, hash;
  };
  const Kind kinds[] = {
      {false, 120, 12, 0x12d44f642755f977}, {false, 60, 130, 0x9bdb7969bb11ca94}, {true, 0, 0, 0xbd7d6265b698d09d}};
  for (const auto* tests : tile_tests()) {
    ck::cpu::state = ck::cpu::kFirstState;
    for (const Kind& kind : kinds) {
      ck::cpu::Hash hash;
      for (int n = 0; n < 200; ++n) {
        Tiles t;
        for (auto* matrix : {&t.a, &t.b})
          for (auto& row : *matrix)
            for (uint16_t& value : row) {
              const uint64_t r = draw();
              const uint64_t exponent = kind.any_bits ? 0 : kind.first_exponent + (r >> 8) % kind.exponents;
              value = static_cast<uint16_t>(kind.any_bits ? r >> 16 : (r >> 40 & 1) << 15 | exponent << 7 | (r & 127));
            }
        for (auto& row : t.c)
          for (uint32_t& value : row) {
            const uint64_t r = draw();
            value = static_cast<uint32_t>(
                kind.any_bits ? r >> 8 : (r >> 40 & 1) << 31 | (118 + (r >> 44) % 14) << 23 | (r >> 8 & 0x7fffff));
          }
        tests->product(t.a, t.b, t.c);
        for (const auto& row : t.c)
          for (const uint32_t value : row) hash.add(value, 4);
      }
      CK_EQUAL(hash.value, kind.hash);
    }
  }
}

}  // namespace

CK_TEST_MAIN()
