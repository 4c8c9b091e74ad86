// Matrix products of a warpgroup, and the mistakes that the simulation reports.
#include <algorithm>
#include <cmath>
#include <vector>

#include "csrc/cuda/device/warpgroup.cuh"
#include "csrc/tests/simt.h"

namespace {

using namespace ck::cuda;
using namespace ck::test;
using ck::bf16;
using ck::f16;

constexpr int kSummed = 64;  // numbers that a sum is of, in 4 products

// Small whole numbers, of which sums are exact: a [rows, kSummed], b [kSummed, columns].
int number_a(int m, int k) { return (m * 5 + k * 3) % 9 - 4; }
int number_b(int k, int n) { return (k * 7 + n * 2) % 11 - 5; }
float first_sum(int m, int n) { return static_cast<float>((m + 2 * n) % 13 - 6); }

// Of -8 to 8.
template <class T>
uint16_t bits_of(int x) {
  if (x == 0) return 0;
  const int sign = x < 0 ? 0x8000 : 0, size = std::abs(x);
  const int exponent = size < 2 ? 0 : size < 4 ? 1 : size < 8 ? 2 : 3;
  constexpr int kFraction = std::is_same_v<T, bf16> ? 7 : 10, kBias = std::is_same_v<T, bf16> ? 127 : 15;
  return static_cast<uint16_t>(sign | (exponent + kBias) << kFraction |
                               (size << kFraction >> exponent) % (1 << kFraction));
}

// Number `at` of row `row` of a panel.
uint16_t& in_panel(char* panel, int row, int at) {
  return reinterpret_cast<uint16_t*>(panel + row * 128 + (at / 8 ^ row % 8) * 16)[at % 8];
}

enum class A { kSummed, kOther, kRegisters };

// Each warpgroup has 64 rows of a. `add`: to what is in d.
template <class T, int kN, A kA, Major kB>
CK_GLOBAL(256, 1)
void multiplies(float* d, bool add) {
  const int t = static_cast<int>(threadIdx.x), group = t / 128, warp = t % 128 / 32, lane = t % 32;
  char* const b = shared_memory_1024();
  char* const a = b + kN * 128 + group * 64 * 128;
  for (int i = t; i < kN * kSummed; i += static_cast<int>(blockDim.x)) {
    const int k = i / kN, n = i % kN;
    uint16_t& to = kB == Major::kSummed ? in_panel(b, n, k) : in_panel(b + n / 64 * 64 * 128, k, n % 64);
    to = bits_of<T>(number_b(k, n));
  }
  for (int i = t % 128; i < 64 * kSummed && kA != A::kRegisters; i += 128) {
    const int m = i / kSummed, k = i % kSummed;
    (kA == A::kSummed ? in_panel(a, m, k) : in_panel(a, k, m)) = bits_of<T>(number_a(group * 64 + m, k));
  }
  fence_async_proxy();
  __syncthreads();
  const auto row = [&](int e) { return group * 64 + warp * 16 + lane / 4 + e / 2 * 8; };
  const auto column = [&](int x, int e) { return x * 8 + lane % 4 * 2 + e % 2; };
  float sums[kN / 8][4];
  for (int x = 0; x < kN / 8; ++x)
    for (int e = 0; e < 4; ++e) sums[x][e] = add ? d[row(e) * kN + column(x, e)] : NAN;
  keep_registers(sums);
  wgmma_fence();
  for (int step = 0; step < kSummed / 16; ++step) {
    const uint64_t b_step = kB == Major::kSummed ? operand(b + step * 32) : operand(b + step * 2048, 64 * 128);
    if constexpr (kA == A::kRegisters) {
      uint32_t fragment[4];
      for (int r = 0; r < 4; ++r) {
        const int m = row(r % 2 * 2), k = step * 16 + r / 2 * 8 + lane % 4 * 2;
        fragment[r] = bits_of<T>(number_a(m, k)) | static_cast<uint32_t>(bits_of<T>(number_a(m, k + 1))) << 16;
      }
      wgmma<T, kN, kB>(sums, fragment, b_step, add || step > 0);
    } else {
      constexpr Major kMajor = kA == A::kSummed ? Major::kSummed : Major::kOther;
      wgmma<T, kN, kMajor, kB>(sums, operand(a + step * (kA == A::kSummed ? 32 : 2048)), b_step, add || step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep_registers(sums);
  for (int x = 0; x < kN / 8; ++x)
    for (int e = 0; e < 4; ++e) d[row(e) * kN + column(x, e)] = sums[x][e];
}

template <class T, int kN, A kA, Major kB>
void check_products() {
  for (const bool add : {false, true}) {
    std::vector<float> d(128 * kN, NAN);
    for (int i = 0; i < 128 * kN && add; ++i) d[i] = first_sum(i / kN, i % kN);
    expect_good(launch(multiplies<T, kN, kA, kB>, 1, 256, (kN + 128) * 128, nullptr, d.data(), add));
    for (int m = 0; m < 128; ++m)
      for (int n = 0; n < kN; ++n) {
        float expected = add ? first_sum(m, n) : 0;
        for (int k = 0; k < kSummed; ++k) expected += static_cast<float>(number_a(m, k) * number_b(k, n));
        CK_EQUAL(d[m * kN + n], expected);
      }
  }
}

template <class T, int kN>
void check_layouts() {
  for_seeds([] {
    check_products<T, kN, A::kSummed, Major::kSummed>();
    check_products<T, kN, A::kSummed, Major::kOther>();
    check_products<T, kN, A::kOther, Major::kSummed>();
    check_products<T, kN, A::kOther, Major::kOther>();
    check_products<T, kN, A::kRegisters, Major::kSummed>();
    check_products<T, kN, A::kRegisters, Major::kOther>();
  });
}

CK_TEST(products_of_64_columns) {
  check_layouts<bf16, 64>();
  check_layouts<f16, 64>();
}

CK_TEST(products_of_128_columns) {
  check_layouts<bf16, 128>();
  check_layouts<f16, 128>();
}

}  // namespace

CK_TEST_MAIN()
