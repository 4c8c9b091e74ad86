// The vector operations, in the width of this compilation: conversions of every 16-bit number, rounding, exp,
// reductions.
#define CK_ISA plain
#define CK_VECTOR_BYTES 16
#include "csrc/cpu/lanes.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "csrc/tests/check.h"

namespace {

using namespace ck::cpu::plain;
using ck::bf16;
using ck::f16;

float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

CK_TEST(every_half_survives_the_way_to_float_and_back) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const f16 h{static_cast<uint16_t>(bits)};
    const bool nan = (bits & 0x7fff) > 0x7c00;
    const f16 back = to_half(to_float(h));
    if (nan)
      CK_EQUAL((back.bits & 0x7fff) > 0x7c00, true);
    else
      CK_EQUAL(back.bits, h.bits);
  }
}

CK_TEST(half_rounds_to_nearest_even) {
  CK_EQUAL(to_half(1.0f + 0x1p-11f).bits, 0x3c00);      // halfway, down to even
  CK_EQUAL(to_half(1.0f + 3 * 0x1p-11f).bits, 0x3c02);  // halfway, up to even
  CK_EQUAL(to_half(1.0f + 0x1.1p-11f).bits, 0x3c01);
  CK_EQUAL(to_half(65519.0f).bits, 0x7bff);
  CK_EQUAL(to_half(65520.0f).bits, 0x7c00);
  CK_EQUAL(to_half(0x1p-25f).bits, 0x0000);
  CK_EQUAL(to_half(0x1.8p-25f).bits, 0x0001);
  CK_EQUAL(to_half(-std::numeric_limits<float>::infinity()).bits, 0xfc00);
}

CK_TEST(bfloat16_rounds_to_nearest_even_and_keeps_nan) {
  std::mt19937 random(3);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t bits = random();
    const float f = from_bits(bits);
    bf16 scalar;
    from_float(f, scalar);
    Vec<float> v[2] = {splat(f), splat(f)};
    bf16 row[Lanes<bf16>::kUnit];
    Lanes<bf16>::store(row, 0, v, false);
    for (const bf16& e : row) {
      // Which NaN a NaN becomes is not specified.
      if (f == f)
        CK_EQUAL(e.bits, scalar.bits);
      else
        CK_EQUAL(to_float(e) != to_float(e), true);
    }
    if (f != f) {
      CK_EQUAL(to_float(scalar) != to_float(scalar), true);
    } else if (std::isfinite(to_float(scalar))) {
      // One of the two neighbours, and not the farther one.
      const double low = from_bits(bits & 0xffff0000u);
      const double got = to_float(scalar), other = from_bits((bits & 0xffff0000u) + 0x10000u);
      const double near = std::min(std::abs(low - f), std::isfinite(other) ? std::abs(other - f) : INFINITY);
      CK_EQUAL(std::abs(got - f) <= near, true);
    }
  }
}

CK_TEST(loads_and_stores_are_inverse) {
  alignas(64) bf16 from[Lanes<bf16>::kUnit], to[Lanes<bf16>::kUnit];
  for (int i = 0; i < Lanes<bf16>::kUnit; ++i) from[i].bits = static_cast<uint16_t>(0x3f80 + i);
  const Vec<float> v[2] = {Lanes<bf16>::load<0>(from, 0), Lanes<bf16>::load<1>(from, 0)};
  for (int part = 0; part < 2; ++part)
    for (int lane = 0; lane < kLanes<float>; ++lane)
      CK_EQUAL(to_bits(v[part][lane]) >> 16, from[Lanes<bf16>::channel(part, lane)].bits);
  Lanes<bf16>::store(to, 0, v, false);
  for (int i = 0; i < Lanes<bf16>::kUnit; ++i) CK_EQUAL(to[i].bits, from[i].bits);
}

template <class S>
void check_exp2(S low, S step, double limit) {
  constexpr S kInf = std::numeric_limits<S>::infinity();
  double worst = 0.0;
  for (S x = low; x < -low; x += step) {
    const long double expected = std::exp2(static_cast<long double>(x));
    worst = std::max(worst, static_cast<double>(std::abs(vexp2<S>(splat(x))[0] - expected) / expected));
  }
  CK_EQUAL(worst < limit, true);
  CK_EQUAL(vexp2<S>(splat(-kInf))[0], S{0});
  CK_EQUAL(vexp2<S>(splat(low - 2))[0], S{0});
  CK_EQUAL(vexp2<S>(splat(S{0}))[0], S{1});
  CK_EQUAL(vexp2<S>(splat(S{-3}))[0], S{0.125});
  CK_EQUAL(std::isnan(vexp2<S>(splat(std::numeric_limits<S>::quiet_NaN()))[0]), true);
}

CK_TEST(exp2_is_accurate) {
  check_exp2<float>(-125.9f, 0.0037f, 1.2e-7);
  check_exp2<double>(-1021.9, 0.0271, 2.3e-16);
}

template <class S>
void check_bounded_exp2(S low, S step) {
  for (S x = low; x < -low; x += step) CK_EQUAL(vexp2_bounded<S>(splat(x))[0], vexp2<S>(splat(x))[0]);
  CK_EQUAL(vexp2_bounded<S>(splat(-std::numeric_limits<S>::infinity()))[0], S{0});
  CK_EQUAL(std::isnan(vexp2_bounded<S>(splat(std::numeric_limits<S>::quiet_NaN()))[0]), true);
}

CK_TEST(bounded_exp2_is_the_same) {
  check_bounded_exp2<float>(-126.0f, 0.0037f);
  check_bounded_exp2<double>(-1022.0, 0.0271);
}

CK_TEST(exp_is_accurate) {
  double worst = 0;
  for (double x = -86.9; x < 88.7228; x += 0.00173) {
    const float f = static_cast<float>(x);
    const double got = vexp(splat(f))[0], expected = std::exp(static_cast<double>(f));
    worst = std::max(worst, std::abs(got - expected) / expected);
  }
  CK_EQUAL(worst < 2e-7, true);
  CK_EQUAL(vexp(splat(-std::numeric_limits<float>::infinity()))[0], 0.0f);
  CK_EQUAL(vexp(splat(-90.0f))[0], 0.0f);
  CK_EQUAL(vexp(splat(88.722840f))[0], std::numeric_limits<float>::infinity());
  CK_EQUAL(vexp(splat(std::numeric_limits<float>::infinity()))[0], std::numeric_limits<float>::infinity());
  CK_EQUAL(vexp(splat(0.0f))[0], 1.0f);
  const float nan = vexp(splat(std::numeric_limits<float>::quiet_NaN()))[0];
  CK_EQUAL(nan != nan, true);
}

template <class S>
void reductions() {
  constexpr int n = kLanes<S>;
  Vec<S> rows[n] = {};
  S expected[n] = {};
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      rows[i][j] = static_cast<S>(100 * i + j * j);
      expected[i] += static_cast<S>(100 * i + j * j);
    }
    CK_EQUAL(sum_lanes<S>(rows[i]), expected[i]);
    CK_EQUAL(max_lanes<S>(rows[i]), static_cast<S>(100 * i + (n - 1) * (n - 1)));
  }
  Vec<S> turned[n];
  for (int i = 0; i < n; ++i) turned[i] = rows[i];
  transpose<S>(turned);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) CK_EQUAL(turned[i][j], rows[j][i]);
  const Vec<S> total = sum_each<S>(rows);
  for (int i = 0; i < n; ++i) CK_EQUAL(total[i], expected[i]);
}

CK_TEST(reductions_add_every_lane_once) {
  reductions<float>();
  reductions<double>();
}

CK_TEST(scratch_comes_from_what_the_thread_gave_back) {
  const auto address = [](int64_t count) {
    const Scratch<float> memory(count);
    memory[0] = memory[count - 1] = 1;
    return reinterpret_cast<uintptr_t>(memory.get());
  };
  for (int64_t count : {1, 32, 33, 1000, 30000}) {
    const uintptr_t first = address(count);
    CK_EQUAL(first % 64, 0u);
    if (kReserved) CK_EQUAL(address(count), first);
  }
  CK_EQUAL(reserve.kept <= Reserve::kLimit, true);
}

CK_TEST(scratches_that_live_together_share_nothing) {
  std::vector<Scratch<char>*> all;
  for (int64_t i = 0; i < 200; ++i) {
    all.push_back(new Scratch<char>(1 + 37 * i * i));
    memset(all.back()->get(), static_cast<int>(i), static_cast<size_t>(1 + 37 * i * i + 64));
  }
  for (int64_t i = 0; i < 200; ++i)
    for (int64_t at : {int64_t{0}, 37 * i * i})
      CK_EQUAL(static_cast<int>((*all[static_cast<size_t>(i)])[at]), static_cast<int>(static_cast<char>(i)));
  // In no order, and by a thread that did not make them and ends.
  std::thread other([&] {
    for (size_t i = 0; i < all.size(); i += 2) delete all[i];
    CK_EQUAL(reserve.kept <= Reserve::kLimit, true);
  });
  other.join();
  for (size_t i = 1; i < all.size(); i += 2) delete all[i];
  CK_EQUAL(reserve.kept <= Reserve::kLimit, true);
}

CK_TEST(scratch_of_nothing_is_nothing) {
  const int64_t kept = reserve.kept;
  const Scratch<double> none(0), less(-3);
  CK_EQUAL(reserve.kept, kept);
}

}  // namespace

CK_TEST_MAIN()
