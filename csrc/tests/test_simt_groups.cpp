// Named barriers and registers of warpgroups, and the mistakes that the simulation reports.
#include <vector>

#include "csrc/cuda/device/warpgroup.cuh"
#include "csrc/tests/simt.h"

namespace {

using namespace ck::cuda;
using namespace ck::test;

enum class Pair { kRight, kNoBarrier, kOneBarrier };

// Pairs of warps exchange numbers, each pair at a barrier of its own.
template <Pair pair>
CK_GLOBAL(128, 1)
void exchanges(int steps, int* out) {
  CK_SHARED(int, numbers, 128);
  const int t = static_cast<int>(threadIdx.x);
  const int barrier = pair == Pair::kOneBarrier ? 1 : 1 + t / 64;
  int sum = 0;
  for (int step = 0; step < (t < 64 ? steps : steps + 3); ++step) {
    numbers[t] = 1000 * step + t;
    if (pair != Pair::kNoBarrier) barrier_sync(barrier, 64);
    sum += numbers[t ^ 32];
    barrier_sync(barrier + 2, 64);
  }
  out[t] = sum;
}

template <Pair pair>
std::string exchange_status() {
  constexpr int kSteps = 6;
  int out[128];
  if (const char* status = launch(exchanges<pair>, 2, 128, 0, nullptr, kSteps, static_cast<int*>(out))) return status;
  for (int t = 0; t < 128; ++t) {
    const int steps = t < 64 ? kSteps : kSteps + 3;
    if (out[t] != 1000 * (steps * (steps - 1) / 2) + steps * (t ^ 32)) return "wrong";
  }
  return "right";
}

CK_TEST(warps_meet_at_named_barriers) {
  int missed = 0, mixed = 0;
  for_seeds([&] {
    CK_EQUAL(exchange_status<Pair::kRight>(), "right");
    missed += exchange_status<Pair::kNoBarrier>() != "right";
    mixed += exchange_status<Pair::kOneBarrier>() != "right";
  });
  CK_EQUAL(missed, 5);
  CK_EQUAL(mixed, 5);
}

// Warps 2 and 3 read what warps 0 and 1 have written, which do not wait until they come to write again.
CK_GLOBAL(128, 1) void hands_over(int steps, int* out) {
  CK_SHARED(int, numbers, 64);
  const int t = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (t < 64) {
      if (step > 0) barrier_sync(2, 128);
      numbers[t] = 1000 * step + t;
      barrier_arrive(1, 128);
    } else {
      barrier_sync(1, 128);
      sum += numbers[127 - t];
      if (step + 1 < steps) barrier_arrive(2, 128);
    }
  }
  out[t] = sum;
}

CK_TEST(who_arrives_does_not_wait) {
  for_seeds([] {
    int out[128];
    expect_good(launch(hands_over, 3, 128, 0, nullptr, 5, static_cast<int*>(out)));
    for (int t = 64; t < 128; ++t) CK_EQUAL(out[t], 10000 + 5 * (127 - t));
  });
}

// Warps that wait for an mbarrier at which others arrive, which had their turn after them.
CK_GLOBAL(128, 1) void arrives(int steps, int* out) {
  CK_SHARED(uint64_t, barriers, 4);
  CK_SHARED(int, count, 1);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  if (t == 0) {
    count[0] = 0;
    for (int i = 0; i < 4; ++i) mbarrier_init(barriers + i, 32);
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    // Around a ring of warps.
    if (warp > 0 || step > 0) mbarrier_wait(barriers + (warp + 3) % 4, (warp > 0 ? step : step - 1) % 2u);
    if (t % 32 == 0) out[4 * step + warp] = count[0]++;
    __syncwarp();
    mbarrier_arrive(barriers + warp);
  }
}

CK_TEST(warps_go_on_by_arrivals_of_others) {
  for_seeds([] {
    std::vector<int> out(40, -1);
    expect_good(launch(arrives, 1, 128, 0, nullptr, 10, out.data()));
    for (int i = 0; i < 40; ++i) CK_EQUAL(out[static_cast<size_t>(i)], i);
  });
}

enum class Slip { kNone, kMissing, kOtherCount, kLeft, kLanes, kWithoutLanes, kBarrier };

template <Slip slip>
CK_GLOBAL(128, 1)
void meets(int barrier, int threads) {
  const int t = static_cast<int>(threadIdx.x);
  if (slip == Slip::kMissing && t < 32) return;
  if (slip == Slip::kOtherCount && t >= 96) threads -= 32;
  if (slip == Slip::kLanes && t % 32 == 7) ++barrier;
  if (slip == Slip::kWithoutLanes && t == 7) return;
  if (slip == Slip::kBarrier && t >= 64) __syncthreads();
  if (slip == Slip::kLeft)
    barrier_arrive(barrier, threads);
  else
    barrier_sync(barrier, threads);
}

CK_TEST(mistakes_with_named_barriers_are_reported) {
  for_seeds([] {
    const auto met = [](auto* kernel, int barrier, int threads, unsigned block = 128) {
      return launch(kernel, 1, block, 0, nullptr, barrier, threads);
    };
    expect_good(met(meets<Slip::kNone>, 1, 128));
    expect_good(met(meets<Slip::kNone>, 15, 64));
    expect_good(met(meets<Slip::kNone>, 15, 64, 40));
    expect_failure(met(meets<Slip::kNone>, 0, 128), "barrier.sync: expected barriers 1 to 15, got 0");
    expect_failure(met(meets<Slip::kNone>, 16, 128), "got 16");
    expect_failure(met(meets<Slip::kNone>, 1, 0), "expected a multiple of 32 threads, up to the 128 of the block");
    expect_failure(met(meets<Slip::kNone>, 1, 48), "got 48");
    expect_failure(met(meets<Slip::kLeft>, 1, 160), "barrier.arrive: expected a multiple of 32 threads");
    expect_failure(met(meets<Slip::kMissing>, 3, 128),
                   "96 threads wait at barrier.sync, 32 have exited; barrier 3: 96 of 128 threads");
    expect_failure(met(meets<Slip::kOtherCount>, 3, 128), "barrier 3: expected ");
    expect_failure(met(meets<Slip::kOtherCount>, 3, 128), " threads, as those that came before, got ");
    expect_failure(met(meets<Slip::kLeft>, 3, 96), "barrier 3: the block ended when 32 of 96 threads had come");
    expect_failure(met(meets<Slip::kLanes>, 3, 128), "barrier: lane 7 has other operands than the first of its warp");
    expect_failure(met(meets<Slip::kWithoutLanes>, 3, 128), "31 threads wait at barrier.sync (mask 0xffffffff)");
    expect_failure(met(meets<Slip::kBarrier>, 3, 128), "64 threads wait at __syncthreads, 64 threads wait at barrier");
  });
}

// Warpgroup 0 gives registers, and the others take some.
template <int kGives, int kTakes>
CK_GLOBAL(384, 1)
void takes(bool differ) {
  if (threadIdx.x < 128)
    give_registers<kGives>();
  else if (!differ || threadIdx.x < 352)
    take_registers<kTakes>();
  else
    give_registers<kGives>();
}

CK_TEST(registers_are_as_many_as_there_are) {
  for_seeds([] {
    expect_good(launch(takes<24, 240>, 2, 384, 0, nullptr, false));
    expect_good(launch(takes<40, 232>, 2, 384, 0, nullptr, false));
    // What warps have that never asked counts too, 65536 / 384 for each thread.
    expect_failure(launch(takes<56, 232>, 2, 384, 0, nullptr, false),
                   "setmaxnreg: the threads of the block have 66560 registers, of 65536");
    expect_failure(launch(takes<24, 240>, 2, 384, 0, nullptr, true),
                   "expected the same registers for all warps of a warpgroup, got 240 and 24");
    expect_failure(launch(takes<16, 240>, 1, 384, 0, nullptr, false),
                   "setmaxnreg.dec: expected a multiple of 8 from 24 to 256, got 16");
    expect_failure(launch(takes<24, 236>, 1, 384, 0, nullptr, false), "got 236");
  });
}

CK_GLOBAL(384, 1) void one_takes(int lanes) {
  if (threadIdx.x < 128 && static_cast<int>(threadIdx.x % 32) < lanes) take_registers<200>();
}

CK_TEST(registers_are_those_of_whole_warps) {
  for_seeds([] {
    expect_failure(launch(one_takes, 1, 384, 0, nullptr, 32), "the threads of the block have 68608 registers");
    expect_failure(launch(one_takes, 1, 384, 0, nullptr, 31), "124 threads wait at setmaxnreg.inc (mask 0xffffffff)");
  });
}

CK_TEST(only_9_0_has_registers_to_take) {
  for (const char* architecture : {"89", "100"}) {
    setenv("CONVKERNELS_SIMT_ARCH", architecture, 1);
    expect_failure(launch(takes<24, 240>, 1, 384, 0, nullptr, false),
                   std::string(" exists only on compute capability 9.0, and the simulated GPU is sm_") + architecture);
    unsetenv("CONVKERNELS_SIMT_ARCH");
  }
}

}  // namespace

CK_TEST_MAIN()
