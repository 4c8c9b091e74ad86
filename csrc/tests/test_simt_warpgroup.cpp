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
    const Operand b_step = kB == Major::kSummed ? operand(b + step * 32) : operand(b + step * 2048, 64 * 128);
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

CK_TEST(products_of_32_columns) {
  for_seeds([] {
    check_products<bf16, 32, A::kSummed, Major::kSummed>();
    check_products<f16, 32, A::kSummed, Major::kSummed>();
    check_products<bf16, 32, A::kRegisters, Major::kSummed>();
    check_products<f16, 32, A::kRegisters, Major::kSummed>();
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

enum class Slip {
  kNone,
  kReads,
  kWaitsForTooFew,
  kOverwritesA,
  kOverwritesB,
  kWritesSum,
  kNoFence,
  kOneFence,
  kNoProxyFence,
  kProxyFenceFirst,
  kNoCommit,
  kNoWait,
  kOtherLane,
  kMissingLane,
  kWithinRow,
  kWithinPanel,
  kOutside
};

// Two groups of two products with the same sums.
template <Slip slip>
CK_GLOBAL(128, 1)
void slips(float* d) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  char* const a = shared_memory_1024();
  char* const b = a + 64 * 128;
  if (slip == Slip::kProxyFenceFirst) fence_async_proxy();
  for (int i = t; i < 64 * kSummed; i += 128) {
    in_panel(a, i / kSummed, i % kSummed) = bits_of<bf16>(number_a(i / kSummed, i % kSummed));
    in_panel(b, i / kSummed, i % kSummed) = bits_of<bf16>(number_b(i % kSummed, i / kSummed));
  }
  if (slip != Slip::kNoProxyFence && slip != Slip::kProxyFenceFirst) fence_async_proxy();
  __syncthreads();
  float sums[8][4];
  for (int group = 0; group < 2; ++group) {
    if (slip == Slip::kMissingLane && t == 40) return;
    if (slip != Slip::kNoFence && (slip != Slip::kOneFence || group == 0)) wgmma_fence();
    for (int step = 2 * group; step < 2 * group + 2; ++step) {
      Operand from = operand(a + step * 32);
      if (slip == Slip::kOtherLane && t == 40) from = operand(a);
      if (slip == Slip::kWithinRow) from = operand(a + 16);
      if (slip == Slip::kWithinPanel) from = operand(a + 256);
      if (slip == Slip::kOutside) from = operand(b + 1024);
      wgmma<bf16, 64>(sums, from, operand(b + step * 32), step > 0);
    }
    if (slip != Slip::kNoCommit) wgmma_commit();
  }
  // A number of a product of the first group, and one of the second.
  if (slip == Slip::kOverwritesA && t == 7) in_panel(a, 10, 3) = 0;
  if (slip == Slip::kOverwritesB && t == 127) in_panel(b, 63, 63) = 0;
  if (slip == Slip::kWritesSum && t == 127) sums[7][3] = 0;
  if (slip == Slip::kWaitsForTooFew) wgmma_wait<1>();
  if (slip != Slip::kReads && slip != Slip::kWaitsForTooFew && slip != Slip::kNoWait) wgmma_wait<0>();
  for (int x = 0; x < 8; ++x)
    for (int e = 0; e < 4; ++e) d[(warp * 16 + lane / 4 + e / 2 * 8) * 64 + x * 8 + lane % 4 * 2 + e % 2] = sums[x][e];
  if (slip == Slip::kReads || slip == Slip::kWaitsForTooFew) wgmma_wait<0>();
}

// The status, or whether all sums are right, or NaN.
template <Slip slip>
std::string slip_status(unsigned threads = 128) {
  std::vector<float> d(64 * 64);
  if (const char* status = launch(slips<slip>, 1, threads, 2 * 64 * 128, nullptr, d.data())) return status;
  if (std::all_of(d.begin(), d.end(), [](float x) { return std::isnan(x); })) return "nan";
  for (int i = 0; i < 64 * 64; ++i) {
    float expected = 0;
    for (int k = 0; k < kSummed; ++k) expected += static_cast<float>(number_a(i / 64, k) * number_b(k, i % 64));
    if (d[static_cast<size_t>(i)] != expected) return "wrong";
  }
  return "right";
}

CK_TEST(mistakes_with_products_are_reported) {
  for_seeds([] {
    const auto expect = [](const std::string& status, const char* part) { expect_failure(status.c_str(), part); };
    CK_EQUAL(slip_status<Slip::kNone>(), "right");
    CK_EQUAL(slip_status<Slip::kReads>(), "nan");
    CK_EQUAL(slip_status<Slip::kWaitsForTooFew>(), "nan");
    // Where piece p of row r stands: 128 r + 16 (p ^ r % 8). Row 10 of a is read by warp 0 alone, which writes it, and
    // b by all, some of which may only begin.
    expect(slip_status<Slip::kOverwritesA>(),
           "wgmma: byte 1318 of dynamic shared memory was written before wgmma.wait_group");
    expect(slip_status<Slip::kOverwritesB>(), "byte 16270 of dynamic shared memory was written ");
    expect(slip_status<Slip::kWritesSum>(), "wgmma: a sum was written before wgmma.wait_group");
    expect(slip_status<Slip::kNoFence>(),
           "wgmma.mma_async without wgmma.fence since the last wgmma.commit_group or wgmma.wait_group");
    expect(slip_status<Slip::kOneFence>(), "wgmma.mma_async without wgmma.fence");
    expect(slip_status<Slip::kNoProxyFence>(),
           " of dynamic shared memory was written by a thread and no fence.proxy.async followed");
    expect(slip_status<Slip::kProxyFenceFirst>(), "wgmma.mma_async, a: byte ");
    expect(slip_status<Slip::kNoCommit>(), "wgmma.wait_group: no wgmma.commit_group followed a product");
    expect(slip_status<Slip::kNoWait>(), "wgmma: a thread ended before wgmma.wait_group for its products");
    expect(slip_status<Slip::kOtherLane>(), "wgmma.mma_async: lane 8 has other operands than the first of its warp");
    expect(slip_status<Slip::kMissingLane>(), "31 threads wait at wgmma.fence (mask 0xffffffff)");
    expect(slip_status<Slip::kWithinRow>(),
           "wgmma.mma_async, a: an operand cannot begin at byte 16 of dynamic shared memory");
    expect(slip_status<Slip::kWithinPanel>(), "a: an operand cannot begin at byte 256");
    expect(slip_status<Slip::kOutside>(), "wgmma.mma_async, a: an address is not in shared memory");
    expect(slip_status<Slip::kNone>(96), "expected a block of whole warpgroups of 128 threads, got 96");
  });
}

CK_GLOBAL(128, 1) void overlaps() {
  float sums[20][4];
  const Operand nan = operand(shared_memory_1024());
  wgmma_fence();
  wgmma<bf16, 64>(reinterpret_cast<float (&)[8][4]>(sums), nan, nan, false);
  wgmma<bf16, 128>(reinterpret_cast<float (&)[16][4]>(sums[4]), nan, nan, false);
}

CK_TEST(sums_of_two_shapes_are_reported) {
  expect_failure(launch(overlaps, 1, 128, 128 * 128, nullptr),
                 "wgmma.mma_async: some of the sums belong to a product of another shape that is not done");
}

CK_GLOBAL(128, 1) void has_no_panel() {
  float sums[16][4];
  const Operand nan = operand(shared_memory_1024());
  wgmma_fence();
  wgmma<f16, 128, Major::kOther, Major::kOther>(sums, nan, nan, false);
}

CK_TEST(panels_lie_at_multiples_of_1024_bytes) {
  expect_failure(launch(has_no_panel, 1, 128, 128 * 128, nullptr),
                 "wgmma.mma_async, b: expected panels that are a multiple of 1024 bytes apart, got 16");
}

CK_TEST(only_9_0_has_products_of_warpgroups) {
  for (const char* architecture : {"89", "100"}) {
    setenv("CONVKERNELS_SIMT_ARCH", architecture, 1);
    expect_failure(slip_status<Slip::kNone>().c_str(), std::string("wgmma.mma_async exists only on compute capability "
                                                                   "9.0, and the simulated GPU is sm_") +
                                                           architecture);
    unsetenv("CONVKERNELS_SIMT_ARCH");
  }
}

// The number of sums that are there after the wait for the first of two groups, and after the other one.
CK_GLOBAL(128, 1) void waits_twice(int* there) {
  const int t = static_cast<int>(threadIdx.x);
  char* const zeros = shared_memory_1024();
  for (int i = t; i < 64 * 128 / 4; i += 128) reinterpret_cast<int*>(zeros)[i] = 0;
  fence_async_proxy();
  __syncthreads();
  float sums[2][8][4];
  for (auto& group : sums) {
    wgmma_fence();
    wgmma<bf16, 64>(group, operand(zeros), operand(zeros), false);
    wgmma_commit();
  }
  const auto count = [&](float (&group)[8][4]) {
    int n = 0;
    for (const auto& fragment : group) n += static_cast<int>(std::count(fragment, fragment + 4, 0.0f));
    return n;
  };
  wgmma_wait<1>();
  there[t] = 100 * count(sums[0]) + count(sums[1]);
  wgmma_wait<0>();
  there[128 + t] = 100 * count(sums[0]) + count(sums[1]);
}

CK_TEST(groups_are_waited_for_one_by_one) {
  for_seeds([] {
    int there[256];
    expect_good(launch(waits_twice, 1, 128, 64 * 128, nullptr, static_cast<int*>(there)));
    for (int t = 0; t < 128; ++t) {
      CK_EQUAL(there[t], 3200);
      CK_EQUAL(there[128 + t], 3232);
    }
  });
}

}  // namespace

CK_TEST_MAIN()
