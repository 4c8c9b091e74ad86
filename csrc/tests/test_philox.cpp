// Philox4x32-10 against the known answers of its authors (Salmon et al. 2011), and the way weight dropout uses it.
#include <cstdint>

#include "csrc/common/philox.h"
#include "csrc/tests/check.h"

namespace {

struct Answer {
  uint32_t counter[4], key[2], word[4];
};

constexpr Answer kAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

CK_TEST(known_answers) {
  for (const Answer& a : kAnswers) {
    const ck::PhiloxBlock block =
        ck::philox4x32(a.counter[0], a.counter[1], a.counter[2], a.counter[3], a.key[0], a.key[1]);
    for (int i = 0; i < 4; ++i) CK_EQUAL(block.word[i], a.word[i]);
  }
}

CK_TEST(tap_words_place_the_coordinates) {
  const Answer& a = kAnswers[2];
  const uint64_t seed = uint64_t{a.key[1]} << 32 | a.key[0];
  // Counter words are (t, b, h, quad).
  const ck::PhiloxBlock block = ck::tap_words(seed, a.counter[1], a.counter[0], a.counter[2], a.counter[3]);
  for (int i = 0; i < 4; ++i) CK_EQUAL(block.word[i], a.word[i]);
}

CK_TEST(coordinates_wrap_at_32_bits) {
  const ck::PhiloxBlock near = ck::tap_words(7, 1, 5, 2, 3);
  const ck::PhiloxBlock far = ck::tap_words(7, 1, 5 + (int64_t{1} << 32), 2, 3);
  for (int i = 0; i < 4; ++i) CK_EQUAL(far.word[i], near.word[i]);
}

CK_TEST(drop_thresholds) {
  CK_EQUAL(ck::drop_threshold(0.0), 0u);
  CK_EQUAL(ck::drop_threshold(0.5), uint64_t{1} << 31);
  CK_EQUAL(ck::drop_threshold(0.1), 429496729u);
  // Above every 32-bit word: nothing is kept.
  CK_EQUAL(ck::drop_threshold(1.0), uint64_t{1} << 32);
}

CK_TEST(the_share_of_dropped_elements_is_the_probability) {
  const uint64_t threshold = ck::drop_threshold(0.3);
  const int64_t rows = 20000;
  int64_t dropped = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const ck::PhiloxBlock block = ck::tap_words(0x123456789abcdefULL, 0, t, 0, 0);
    for (uint32_t word : block.word) dropped += word < threshold ? 1 : 0;
  }
  // Five standard deviations of the mean of 80,000 draws.
  CK_CLOSE(static_cast<double>(dropped) / (4.0 * rows), 0.3, 0.0081);
}

CK_TEST_MAIN()
