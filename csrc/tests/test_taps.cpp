// The index relation: the hand-made table, and its helper functions against the definition, exhaustively on a small
// box.
#include <cstdint>

#include "csrc/common/taps.h"
#include "csrc/tests/check.h"

namespace {

struct Row {
  int64_t taps, left, dilation, begin, end, t, source, first, last;
};

constexpr Row kTable[] = {
#include "tests/taps_table.inc"
};

template <class Body>
void for_each_small_relation(Body body) {
  for (int64_t taps = 1; taps <= 6; ++taps)
    for (int64_t dilation = 1; dilation <= 4; ++dilation)
      for (int64_t left = 0; left <= (taps - 1) * dilation; ++left) body(ck::Taps{taps, left, dilation});
}

}  // namespace

CK_TEST(table) {
  for (const Row& row : kTable) {
    const ck::Taps taps{row.taps, row.left, row.dilation};
    CK_EQUAL(taps.source(row.t, 0), row.source);
    CK_EQUAL(taps.first_inside(row.t, row.begin), row.first);
    CK_EQUAL(taps.last_inside(row.t, row.end), row.last);
  }
}

CK_TEST(inside_is_a_range_of_taps) {
  for_each_small_relation([](const ck::Taps& taps) {
    for (int64_t begin = 0; begin <= 3; ++begin)
      for (int64_t end = begin + 1; end <= 8; ++end)
        for (int64_t t = begin; t < end; ++t) {
          const int64_t first = taps.first_inside(t, begin), last = taps.last_inside(t, end);
          for (int64_t j = 0; j < taps.taps; ++j) {
            const int64_t s = taps.source(t, j);
            CK_EQUAL(j >= first && j < last, s >= begin && s < end);
          }
        }
  });
}

CK_TEST(target_inverts_source) {
  for_each_small_relation([](const ck::Taps& taps) {
    for (int64_t t = -3; t <= 3; ++t)
      for (int64_t j = 0; j < taps.taps; ++j) CK_EQUAL(taps.target(taps.source(t, j), j), t);
  });
}

CK_TEST(transposed_reads_what_was_written_to) {
  for_each_small_relation([](const ck::Taps& taps) {
    const ck::Taps back = taps.transposed();
    for (int64_t s = -3; s <= 3; ++s)
      for (int64_t j = 0; j < taps.taps; ++j) CK_EQUAL(back.source(s, taps.taps - 1 - j), taps.target(s, j));
  });
}

CK_TEST(positions_beyond_32_bits) {
  const ck::Taps taps{3, 2, 1};
  const int64_t t = int64_t{5} << 32;
  CK_EQUAL(taps.source(t, 1), t - 1);
  CK_EQUAL(taps.first_inside(t, t - 1), 1);
  CK_EQUAL(taps.last_inside(t, t), 2);
}

CK_TEST_MAIN()
