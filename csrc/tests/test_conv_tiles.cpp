// The convolutions in bfloat16 on tiles: the same bits from every compilation of them, from any number of threads and
// as recorded; close to the portable kernels, which the Python tests hold against the definition; NaN, infinity and
// denormal numbers; and that tiles are what computes.
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "csrc/tests/check.h"
#include "csrc/tests/numbers.h"
#include "csrc/tests/tile_sets.h"

namespace {

using ck::bf16;
using ck::cpu::ConvBackward;
using ck::cpu::ConvForward;
using ck::cpu::ConvProblem;
using ck::cpu::draw;
using ck::cpu::halves;
using ck::cpu::Kernels;
using ck::cpu::kernels_of;
using ck::cpu::number;
using ck::cpu::scattered;
using ck::cpu::serial;
using ck::cpu::sets_with_tiles;
using ck::cpu::upper_half;
using ck::cpu::value;

std::vector<bf16> rows_of(int64_t n) {
  std::vector<bf16> rows(static_cast<size_t>(n));
  for (bf16& x : rows) x = upper_half(value());
  return rows;
}
std::vector<float> numbers_of(int64_t n) {
  std::vector<float> numbers(static_cast<size_t>(n));
  for (float& x : numbers) x = value();
  return numbers;
}

struct Shape {
  int64_t B, T, H, R, K, left, dilation;
  bool per_position, softmax, renormalize, masked, with_state, with_bias, packed;
  double dropout;
  uint64_t hash;
};

struct Case {
  Shape s;
  std::vector<bf16> x, dy, history;
  std::vector<float> weight, bias;
  std::unique_ptr<bool[]> mask;
  std::vector<int64_t> offsets;

  explicit Case(const Shape& shape) : s(shape), mask(new bool[static_cast<size_t>(s.B * s.T)]) {
    ck::cpu::state = ck::cpu::kFirstState;
    x = rows_of(s.B * s.T * C());
    dy = rows_of(s.B * s.T * C());
    weight = numbers_of((s.per_position ? s.B * s.T : 1) * s.H * s.K);
    bias = numbers_of(C());
    for (int64_t n = 0; n < s.B * s.T; ++n) mask[static_cast<size_t>(n)] = draw() % 5 != 0;
    offsets = {0, s.T / 3, s.T / 3, s.T - 5, s.T};
    history = rows_of(s.with_state ? s.B * sequences() * span() * C() : 0);
  }

  int64_t C() const { return s.H * s.R; }
  int64_t span() const { return s.dilation * (s.K - 1); }
  int64_t sequences() const { return s.packed ? 4 : 1; }
  ck::Rows rows(const std::vector<bf16>& t) const { return {const_cast<bf16*>(t.data()), s.T * C(), C(), 1}; }

  void enter(ConvProblem& p, ck::cpu::ParallelFor parallel, int64_t threads) const {
    p.batch = s.B;
    p.time = s.T;
    p.channels = C();
    p.heads = s.H;
    p.taps = {s.K, s.left, s.dilation};
    p.dtype = ck::Dtype::kBFloat16;
    p.weight_dtype = p.bias_dtype = ck::Dtype::kFloat32;
    p.x = rows(x);
    if (s.masked) {
      p.mask = mask.get();
      p.mask_batch = s.T;
      p.mask_time = 1;
    }
    if (s.with_state) p.state = history.data();
    if (s.packed) {
      p.sequences = sequences();
      p.offsets = offsets.data();
    }
    p.weight = weight.data();
    p.per_position = s.per_position;
    p.weight_batch = s.per_position ? s.T * s.H * s.K : 0;
    p.weight_time = s.per_position ? s.H * s.K : 0;
    p.weight_head = s.K;
    p.weight_tap = 1;
    p.softmax = s.softmax;
    p.renormalize = s.renormalize;
    p.dropout = s.dropout;
    p.seed = 12345;
    p.parallel_for = parallel;
    p.threads = threads;
  }
};

// y and the gradients of x and the state; those of weight and bias.
struct Results {
  std::vector<bf16> rows[3];
  std::vector<float> numbers[2];

  uint64_t hash() const { return ck::cpu::hash_of(rows, numbers); }
  std::vector<float> all() const {
    std::vector<float> list;
    for (const auto& part : rows)
      for (const bf16 x : part) list.push_back(number(x));
    for (const auto& part : numbers) list.insert(list.end(), part.begin(), part.end());
    return list;
  }
};

Results run(const Kernels& kernels, const Case& c, ck::cpu::ParallelFor parallel = serial, int64_t threads = 1) {
  Results found;
  found.rows[0] = found.rows[1] = std::vector<bf16>(c.x.size(), bf16{0x7fc0});
  found.rows[2] = std::vector<bf16>(c.history.size(), bf16{0x7fc0});
  found.numbers[0].assign(c.weight.size(), NAN);
  found.numbers[1].assign(c.bias.size(), NAN);
  ConvForward f;
  c.enter(f, parallel, threads);
  f.y = c.rows(found.rows[0]);
  if (c.s.with_bias) f.bias = c.bias.data();
  CK_TRUE(kernels.conv_forward(f) == nullptr);
  ConvBackward b;
  c.enter(b, parallel, threads);
  b.grad = c.rows(c.dy);
  b.grad_x = c.rows(found.rows[1]);
  b.grad_weight = found.numbers[0].data();
  b.grad_bias = found.numbers[1].data();
  if (c.s.with_state) b.grad_state = found.rows[2].data();
  CK_TRUE(kernels.conv_backward(b) == nullptr);
  return found;
}

const Shape kShapes[] = {
    // B, T, H, R, K, left, dilation, per_position, softmax, renormalize, masked, with_state, with_bias, packed, dropout
    {2, 96, 2, 64, 11, 5, 1, false, true, false, false, false, false, false, 0.0, 0xb3dc8d0e2fda70e5},
    {1, 70, 3, 32, 17, 16, 1, false, false, false, true, false, true, false, 0.0, 0xba7693b27092d749},
    {3, 61, 2, 32, 18, 0, 1, false, true, false, false, false, true, false, 0.5, 0xc646ad234da1b7c3},
    {1, 333, 1, 96, 31, 15, 2, false, true, false, true, false, false, false, 0.0, 0x35f982f54a4e3585},
    {2, 150, 2, 32, 33, 32, 1, false, false, false, false, true, true, true, 0.0, 0xe163dc1fa4215786},
    {1, 129, 2, 32, 15, 42, 3, false, true, false, false, true, false, false, 0.0, 0xd37591186da1f809},
    {1, 90, 2, 96, 13, 6, 1, false, true, true, true, false, false, false, 0.0, 0xe4f5760d79f97303},
    {2, 77, 2, 128, 15, 7, 1, true, true, false, false, false, true, false, 0.0, 0x6e31c1bb8fe554f0},
    {1, 130, 3, 64, 31, 30, 1, true, true, true, false, true, false, true, 0.25, 0x567e89e9385c7803},
    {1, 101, 1, 96, 33, 32, 2, true, false, false, true, false, false, false, 0.0, 0xf2487ea0ecf34b5b},
    {2, 48, 2, 128, 17, 3, 1, true, false, false, false, false, false, false, 0.0, 0xe05975f9eea3c0be},
};

CK_TEST(the_same_bits_everywhere) {
  for (const Shape& shape : kShapes) {
    const Case c(shape);
    for (const Kernels* kernels : sets_with_tiles()) {
      CK_EQUAL(run(*kernels, c).hash(), shape.hash);
      CK_EQUAL(run(*kernels, c, halves, 2).hash(), shape.hash);
    }
    CK_EQUAL(run(*sets_with_tiles().back(), c, scattered, 7).hash(), shape.hash);
  }
}

// Elements that differ by more than bfloat16 rounds and sums in another order do, or in what is not finite.
int64_t differences(const Case& c, const Kernels& kernels) {
  const std::vector<float> expected = run(kernels_of("portable"), c).all(), found = run(kernels, c).all();
  int64_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const float a = expected[i], b = found[i];
    const bool close = std::fabs(a - b) <= 0x1p-7f * std::fabs(a) + 1e-4f;
    wrong += !(std::isnan(a) ? std::isnan(b) : std::isinf(a) ? a == b : close);
  }
  return wrong;
}

CK_TEST(close_to_the_portable_kernels) {
  for (const Shape& shape : kShapes) CK_EQUAL(differences(Case(shape), *sets_with_tiles().back()), 0);
}

// A call whose outputs tell the two ways apart: rows of denormal numbers, which tiles take for zeros.
CK_TEST(tiles_convolve) {
  for (const bool per_position : {false, true}) {
    for (const int64_t K : {11, 17, 18, 33}) {
      Case c({1, 32, 2, 128, K, 5, 1, per_position, false, false, false, false, false, false, 0.0, 0});
      for (auto* rows : {&c.x, &c.dy}) rows->assign(rows->size(), bf16{0x0040});
      c.weight.assign(c.weight.size(), 0.5f);
      const auto zero = [](bf16 x) { return number(x) == 0.0f; };
      for (const Kernels* kernels : sets_with_tiles()) {
        const Results found = run(*kernels, c);
        for (int part = 0; part < 2; ++part)
          for (const bf16 x : found.rows[part]) CK_TRUE(zero(x));
      }
      for (const bf16 x : run(kernels_of("portable"), c).rows[0]) CK_TRUE(!zero(x));
    }
  }
}

// A chain of products of a tile loses each 1 that it adds to 2^24; sums of lanes do not.
CK_TEST(tiles_correlate) {
  for (const bool per_position : {false, true}) {
    for (const int64_t K : {15, 18}) {
      Case c({1, 32, 1, 128, K, 0, 1, per_position, false, false, false, false, false, false, 0.0, 0});
      for (auto* rows : {&c.x, &c.dy}) rows->assign(rows->size(), bf16{0});
      for (size_t i = 0; i < 32; i += 2) c.x[20 * 128 + i] = c.dy[16 * 128 + i] = upper_half(i == 0 ? 4096.0f : 1.0f);
      const size_t place = static_cast<size_t>(per_position ? 16 * K : 0) + 4;
      for (const Kernels* kernels : sets_with_tiles()) {
        const std::vector<float> found = run(*kernels, c).numbers[0];
        for (size_t i = 0; i < found.size(); ++i) CK_EQUAL(found[i], i == place ? 0x1p24f : 0.0f);
      }
      CK_TRUE(run(kernels_of("portable"), c).numbers[0][place] > 0x1p24f);
    }
  }
}

// NaN, infinity and numbers at the ends of their types: where they reach, and that no number of threads moves it.
CK_TEST(special_numbers_reach_what_they_reach_by_vectors) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Shape& shape : kShapes) {
    for (const float special : {NAN, infinity, -infinity}) {
      for (int place = 0; place < 4; ++place) {
        Case c(shape);
        const auto at = [&](int64_t t, int64_t channel) { return static_cast<size_t>(t * c.C() + channel); };
        if (place == 0) c.x[at(shape.T / 2, 7)] = c.x[at(3, 20)] = upper_half(special);
        if (place == 1) c.dy[at(shape.T / 2 + 1, c.C() - 1)] = upper_half(special);
        if (place == 2) c.weight[static_cast<size_t>(shape.K / 2)] = special;
        if (place == 3) c.bias[9] = special;
        const Kernels& kernels = *sets_with_tiles().back();
        CK_EQUAL(differences(c, kernels), 0);
        CK_EQUAL(run(kernels, c, scattered, 5).hash(), run(kernels, c).hash());
      }
    }
  }
}

// What tiles would lose beside large numbers: denormal ones in a gradient of filters, filters with denormal terms, and
// denormal inputs times large filters.
CK_TEST(nothing_is_lost_to_denormal_numbers) {
  for (const bool per_position : {false, true}) {
    const Shape shape{1, 64, 2, 64, 31, 15, 1, per_position, false, false, false, false, false, false, 0.0, 0};
    const auto compare = [](const Case& c) {
      const std::vector<float> expected = run(kernels_of("portable"), c).all();
      for (const Kernels* kernels : sets_with_tiles()) {
        const std::vector<float> found = run(*kernels, c).all();
        for (size_t i = 0; i < expected.size(); ++i)
          CK_CLOSE(found[i], expected[i], 0x1p-7 * std::fabs(expected[i]) + 0x1p-110);
      }
    };
    Case c(shape);
    for (bf16& x : c.x) x = upper_half(std::fabs(number(x)) * 0x1p100f);
    for (bf16& x : c.dy) x = {static_cast<uint16_t>(x.bits & 0x7f)};
    compare(c);
    c.dy.swap(c.x);
    compare(c);
    c = Case(shape);
    for (auto* rows : {&c.x, &c.dy})
      for (bf16& x : *rows) x = upper_half(std::fabs(number(x)) * 0x1p50f);
    for (float& w : c.weight) w = std::fabs(w) * 0x1p-128f;
    compare(c);
    for (auto* rows : {&c.x, &c.dy})
      for (bf16& x : *rows) x = {static_cast<uint16_t>(x.bits & 0x7f)};
    for (float& w : c.weight) w = std::fabs(w) * 0x1p122f;
    compare(c);
  }
}

}  // namespace

CK_TEST_MAIN()
