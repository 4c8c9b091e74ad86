// The operands of attention and of convolutions on tiles, and the arithmetic on vectors beside them: against plain
// loops, and the same bits from every compilation.
#include <cmath>
#include <cstring>
#include <random>

#include "csrc/tests/check.h"
#include "csrc/tests/numbers.h"
#include "csrc/tests/tile_products.h"

namespace {

using ck::bf16;
using ck::cpu::kFunctions;
using ck::cpu::number;
using ck::cpu::tile_tests;

int64_t channel_of(int64_t tile, int64_t n) { return tile / 2 * 32 + n / 4 * 8 + tile % 2 * 4 + n % 4; }

CK_TEST(products_of_all_formats) {
  std::mt19937 random(5);
  for (const int64_t channels : {1, 5, 32, 40, 64, 65, 128}) {
    // Small integers: every sum is exact.
    std::vector<bf16> a(static_cast<size_t>(32 * channels)), b = a;
    for (auto* matrix : {&a, &b})
      for (bf16& x : *matrix) x = ck::cpu::upper_half(static_cast<float>(static_cast<int>(random() % 17) - 8));
    const auto at = [channels](const std::vector<bf16>& m, int64_t r, int64_t c) {
      return c < channels ? number(m[static_cast<size_t>(r * channels + c)]) : 0.0f;
    };
    const int64_t sixteens = (channels + 31) / 32 * 2;
    for (const auto* tests : tile_tests()) {
      std::vector<float> by_channels(1024, NAN), by_rows(static_cast<size_t>(sixteens * sixteens * 256), NAN);
      tests->products(a.data(), b.data(), channels, by_channels.data(), by_rows.data());
      int64_t wrong = 0;
      for (int64_t i = 0; i < 32; ++i)
        for (int64_t j = 0; j < 32; ++j) {
          float sum = 0;
          for (int64_t c = 0; c < channels; ++c) sum += at(a, i, c) * at(b, j, c);
          wrong += by_channels[static_cast<size_t>(j / 16 * 512 + i * 16 + j % 16)] != sum;
        }
      for (int64_t t = 0; t < sixteens; ++t)
        for (int64_t u = 0; u < sixteens; ++u)
          for (int64_t m = 0; m < 16; ++m)
            for (int64_t n = 0; n < 16; ++n) {
              float sum = 0;
              for (int64_t i = 0; i < 32; ++i) sum += at(a, i, channel_of(t, m)) * at(b, i, channel_of(u, n));
              wrong += by_rows[static_cast<size_t>((t * sixteens + u) * 256 + m * 16 + n)] != sum;
            }
      CK_EQUAL(wrong, 0);
    }
  }
}

// Results of 32 numbers, from every compilation; those that are NaN may differ in their bits.
std::vector<float> functions(const float* x) {
  std::vector<float> first;
  for (const auto* tests : tile_tests()) {
    std::vector<float> found(kFunctions * 16);
    tests->functions(x, found.data());
    if (first.empty()) first = found;
    for (size_t i = 0; i < found.size(); ++i) {
      const bool halves = i / 16 >= 7;  // pairs of bfloat16 numbers
      if (halves || !(std::isnan(found[i]) && std::isnan(first[i]))) CK_EQUAL(std::memcmp(&found[i], &first[i], 4), 0);
    }
  }
  return first;
}

CK_TEST(vectors_give_the_same_bits) {
  std::mt19937 random(7);
  for (int n = 0; n < 20000; ++n) {
    float x[32];
    for (float& value : x) {
      const uint32_t r = random(), exponent = n % 2 ? 100 + random() % 36 : 1 + random() % 254;
      value = number((r & 0x80000000u) | exponent << 23 | (r & 0x7fffffu));
    }
    functions(x);
  }
}

CK_TEST(special_numbers_give_the_same_bits) {
  const float infinity = INFINITY;
  const float x[] = {0.0f,   -0.0f,   1.0f,    -1.0f,   -1e-9f,  1e-9f,    -0.99999994f, 127.5f,
                     128.0f, -126.0f, -126.5f, -127.0f, -150.0f, infinity, -infinity,    0x1p-126f,
                     2.0f,   3.0f,    1e30f,   -1e30f,  0.5f,    -0.5f,    1.5f,         2.5f,
                     -2.5f,  100.0f,  -100.0f, 7.0f,    0x1p20f, -0x1p20f, 6e7f,         -6e7f};
  const std::vector<float> found = functions(x);
  CK_EQUAL(found[4], 0.99999994f);    // the fraction of -1e-9 is below 1
  CK_EQUAL(found[16 + 8], INFINITY);  // 2^128
  CK_EQUAL(found[16 + 11], 0.0f);     // 2^-127
  CK_EQUAL(found[16 + 14], 0.0f);     // 2^-infinity
}

CK_TEST(powers_and_logarithms_are_close) {
  std::mt19937 random(9);
  std::uniform_real_distribution<float> scores(-49.0f, 49.0f);
  double worst = 0;
  for (int n = 0; n < 20000; ++n) {
    float x[32];
    for (float& value : x) value = scores(random);
    const std::vector<float> found = functions(x);
    for (size_t i = 0; i < 16; ++i) {
      worst = std::fmax(worst, std::fabs(found[16 + i] / std::exp2(static_cast<double>(x[i])) - 1.0));
      CK_EQUAL(found[32 + i], found[16 + i] * 0x1p-70f);
      const double power = std::log2(std::fabs(static_cast<double>(x[i]))) + 3.0;
      CK_CLOSE(found[48 + i], power, 1e-6 + 1e-7 * std::fabs(power));
    }
  }
  CK_CLOSE(worst, 0.0, 6e-6);
}

// Every value of a filter is the sum of its three terms, to the last bit; everywhere else are zeros.
CK_TEST(bands_hold_filters) {
  std::mt19937 random(11);
  for (int64_t taps = 1; taps <= 33; ++taps) {
    const int64_t width = taps <= 17 ? 32 : 64;
    std::vector<float> values(static_cast<size_t>(width), 0.0f);
    for (int64_t k = 0; k < taps; ++k) {
      const uint32_t r = random(), exponent = 127 - 100 + random() % 109;
      values[static_cast<size_t>(k)] = k % 5 == 4 ? 0.0f : number((r & 0x807fffffu) | exponent << 23);
    }
    for (const auto* tests : tile_tests()) {
      std::vector<bf16> found(static_cast<size_t>(3 * 16 * width), bf16{0x7fc0});
      CK_TRUE(tests->band(values.data(), taps, found.data()));
      int64_t wrong = 0;
      for (int64_t i = 0; i < 16; ++i)
        for (int64_t j = 0; j < width; ++j) {
          double sum = 0;
          for (int64_t term = 0; term < 3; ++term)
            sum += static_cast<double>(number(found[static_cast<size_t>((term * 16 + i) * width + j)]));
          const int64_t k = j - i;
          wrong += sum != (k >= 0 && k < taps ? static_cast<double>(values[static_cast<size_t>(k)]) : 0.0);
        }
      CK_EQUAL(wrong, 0);
    }
  }
}

CK_TEST(bands_refuse_what_terms_cannot_hold) {
  std::vector<float> values(32, 0.0f);
  std::vector<bf16> band(3 * 512);
  for (const auto* tests : tile_tests()) {
    for (const float good : {0.0f, -0.0f, 0x1p-100f, -0x1p-100f, 512.0f, -512.0f}) {
      values[7] = good;
      CK_TRUE(tests->band(values.data(), 11, band.data()));
    }
    for (const float bad : {0x1.8p-101f, -0x1p-126f, 1e-42f, 513.0f, -1e30f, INFINITY, -INFINITY, NAN}) {
      values[7] = bad;
      CK_TRUE(!tests->band(values.data(), 11, band.data()));
    }
  }
}

}  // namespace

CK_TEST_MAIN()
