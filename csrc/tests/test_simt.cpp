// Launches and barriers of the CPU versions of the CUDA primitives, and the mistakes that they report. With `nvcc -x
// cu` this file and the other test_simt_*.cpp show that the same kernels compile for a GPU.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "csrc/tests/simt.h"

namespace {

using namespace ck::cuda;
using namespace ck::test;

struct Visit {
  int64_t block, thread;
};

CK_GLOBAL(64, 1) void visits(Visit* out, unsigned* order) {
  const int64_t block = blockIdx.x + gridDim.x * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
  const int64_t threads = int64_t{blockDim.x} * blockDim.y * blockDim.z;
  const int64_t thread = threadIdx.x + blockDim.x * (threadIdx.y + int64_t{blockDim.y} * threadIdx.z);
  out[block * threads + thread] = {block, thread};
  order[block * threads + thread] = order[gridDim.x * gridDim.y * gridDim.z * threads]++;  // one thread runs at a time
}

CK_TEST(every_thread_runs_once_with_its_indices_in_no_fixed_order) {
  const dim3 grid(3, 2, 2), block(5, 4, 2);
  const int n = 12 * 40;
  std::vector<unsigned> first;
  for_seeds([&] {
    std::vector<Visit> out(n, {-1, -1});
    std::vector<unsigned> order(n + 1);
    expect_good(launch(visits, grid, block, 0, nullptr, out.data(), order.data()));
    CK_EQUAL(order[n], n);
    bool sorted = true;
    for (int i = 0; i < n; ++i) {
      CK_EQUAL(out[i].block, i / 40);
      CK_EQUAL(out[i].thread, i % 40);
      sorted = sorted && order[i] == static_cast<unsigned>(i);
    }
    CK_TRUE(!sorted);
    CK_TRUE(order != first);
    first = order;
  });
}

template <class T>
CK_GLOBAL(96, 2)
void reverses(T* data, T* sums) {
  CK_SHARED(T, copy, 96);
  CK_SHARED(T, sum, 1);
  const unsigned t = threadIdx.x;
  copy[t] = data[t];
  if (t == 5) sum[0] = 0;
  __syncthreads();
  if (t == 7)
    for (int i = 0; i < 96; ++i) sum[0] += copy[i];
  data[t] = copy[95 - t];
  __syncthreads();
  sums[t] = sum[0];
}

CK_TEST(static_arrays_are_shared_by_the_block) {
  for_seeds([] {
    std::vector<double> data(96), sums(96);
    for (int i = 0; i < 96; ++i) data[i] = i;
    expect_good(launch(reverses<double>, 1, 96, 0, nullptr, data.data(), sums.data()));
    for (int i = 0; i < 96; ++i) CK_EQUAL(data[i], 95.0 - i);
    for (int i = 0; i < 96; ++i) CK_EQUAL(sums[i], 96 * 95 / 2.0);
  });
}

// Passes values round a ring many times. Without either barrier it reads something too early or too late.
template <bool first, bool second>
CK_GLOBAL(128, 1)
void ring(int* out) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const unsigned t = threadIdx.x;
  int value = static_cast<int>(t);
  for (int i = 0; i < 8; ++i) {
    shared[t] = value;
    if (first) __syncthreads();
    value = shared[(t + 33) % 128];
    if (second) __syncthreads();
  }
  out[t] = value;
}

template <bool barrier>
CK_GLOBAL(64, 1)
void ring_of_lanes(int* out) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const unsigned warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  int value = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) {
    shared[warp + lane] = value;
    __syncwarp();
    value = shared[warp + (lane + 5) % 32];
    if (barrier) __syncwarp();
  }
  out[threadIdx.x] = value;
}

CK_TEST(a_missing_barrier_shows) {
  int missing_first = 0, missing_second = 0, missing_warp = 0;
  for_seeds([&] {
    const auto wrong = [](void (*kernel)(int*), int threads, int distance) {
      std::vector<int> out(threads);
      expect_good(launch(kernel, 1, threads, threads * sizeof(int), nullptr, out.data()));
      int count = 0;
      for (int i = 0; i < threads; ++i) {
        const int group = distance == 5 ? 32 : threads;
        count += out[i] != i / group * group + (i % group + 8 * distance) % group;
      }
      return count;
    };
    CK_EQUAL(wrong(ring<true, true>, 128, 33), 0);
    CK_EQUAL(wrong(ring_of_lanes<true>, 64, 5), 0);
    missing_first += wrong(ring<false, true>, 128, 33) != 0;
    missing_second += wrong(ring<true, false>, 128, 33) != 0;
    missing_warp += wrong(ring_of_lanes<false>, 64, 5) != 0;
  });
  CK_EQUAL(missing_first, 5);
  CK_EQUAL(missing_second, 5);
  CK_EQUAL(missing_warp, 5);
}

CK_GLOBAL(96, 1) void gathers(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  out[2 * t] = __syncthreads_or(t == 77);
  out[2 * t + 1] = __syncthreads_or(t == 96);
}

CK_TEST(barriers_gather_predicates) {
  std::vector<int> out(2 * 96);
  expect_good(launch(gathers, 1, 96, 0, nullptr, out.data()));
  for (int t = 0; t < 96; ++t) {
    CK_EQUAL(out[2 * t], 1);
    CK_EQUAL(out[2 * t + 1], 0);
  }
}

CK_GLOBAL(128, 1) void some_leave(int stay) {
  if (static_cast<int>(threadIdx.x) < stay) __syncthreads();
}

CK_GLOBAL(64, 1) void different_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads_or(1);
}

CK_GLOBAL(32, 1) void half_a_warp() {
  if (threadIdx.x < 16) __syncwarp();
}

CK_GLOBAL(32, 1) void different_collectives(int* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_sync(kFull, 1, 0);
  else
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kFull, 1));
}

CK_GLOBAL(32, 1) void mask_without_caller() { __syncwarp(0xffu); }
CK_GLOBAL(32, 1) void reads_unnamed_lane() {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
CK_GLOBAL(32, 1) void odd_width() { __shfl_sync(kFull, 1, 0, 12); }

CK_TEST(divergence_is_reported) {
  expect_failure(launch(some_leave, 1, 128, 0, nullptr, 3), "3 threads wait at __syncthreads, 125 have exited");
  expect_failure(launch(some_leave, 1, 128, 0, nullptr, 1), "1 thread waits at __syncthreads, 127 have exited");
  expect_failure(launch(different_barriers, {2, 3}, 64, 0, nullptr), "32 threads wait at __syncthreads_or");
  expect_failure(launch(half_a_warp, 1, 32, 0, nullptr),
                 "16 threads wait at __syncwarp (mask 0xffffffff), 16 have exited");
  std::vector<int> out(32);
  expect_failure(launch(different_collectives, 1, 32, 0, nullptr, out.data()),
                 "16 threads wait at __ballot_sync (mask 0xffffffff), 16 threads wait at __shfl_sync");
  expect_failure(launch(mask_without_caller, 1, 32, 0, nullptr), "does not name the calling lane");
  expect_failure(launch(half_a_warp, 1, 8, 0, nullptr), "lanes that the block does not have");
  expect_failure(launch(reads_unnamed_lane, 1, 32, 0, nullptr), "reads lane 9, which the mask does not name");
  expect_failure(launch(odd_width, 1, 32, 0, nullptr), "power of two up to 32, got 12");
  // The next launch is not affected.
  expect_good(launch(some_leave, 2, 128, 0, nullptr, 128));
}

CK_TEST(a_failure_says_where) {
  const std::string status = launch(some_leave, dim3(1), 64, 0, nullptr, 3);
  CK_TRUE(status.find("simt: launch at test_simt.cpp:") == 0);
  CK_TRUE(status.find("a_failure_says_where") != std::string::npos);
  CK_TRUE(status.find("block (0,0,0)") != std::string::npos);
}

CK_GLOBAL(1024, 1) void nothing() {}

CK_TEST(impossible_launches_are_refused) {
  expect_good(launch(nothing, 1, 1024, 227 * 1024, nullptr));
  expect_failure(launch(nothing, 0, 32, 0, nullptr), "got 0 x 1 x 1");
  expect_failure(launch(nothing, {1, 65536}, 32, 0, nullptr), "got 1 x 65536 x 1");
  expect_failure(launch(nothing, 1, 1025, 0, nullptr), "got 1025 x 1 x 1");
  expect_failure(launch(nothing, 1, dim3(1, 1, 65), 0, nullptr), "at most 64 of them in z");
  expect_failure(launch(nothing, 1, 0, 0, nullptr), "got 0 x 1 x 1");
  expect_failure(launch(nothing, 1, 32, 227 * 1024 + 1, nullptr), "got 232449");
  expect_failure(launch(reverses<double>, 1, 96, 227 * 1024, nullptr, nullptr, nullptr), "shared memory: at most");
  setenv("CONVKERNELS_SIMT_SEED", "many", 1);
  expect_failure(launch(nothing, 1, 32, 0, nullptr), "CONVKERNELS_SIMT_SEED: expected a whole number, got 'many'");
  unsetenv("CONVKERNELS_SIMT_SEED");
}

#if defined(CK_SIMT)
CK_GLOBAL(64, 1) void throws_exceptions(int* destroyed) {
  struct Guard {
    int* count;
    ~Guard() { ++*count; }
  } guard{destroyed};
  __syncwarp();
  if (threadIdx.x == 40) throw std::invalid_argument("thread 40 throws");
  __syncthreads();
}

CK_TEST(exceptions_become_a_status_and_every_thread_is_unwound) {
  int destroyed = 0;
  const char* const status = launch(throws_exceptions, 3, 64, 0, nullptr, &destroyed);
  expect_failure(status, "thread (40,0,0): thread 40 throws");
  CK_TRUE(destroyed >= 32 && destroyed <= 64);
  expect_good(launch(some_leave, 1, 64, 0, nullptr, 64));
}

CK_GLOBAL(32, 1) void launches(bool* refused) { *refused = launch(nothing, 1, 1, 0, nullptr) != nullptr; }

CK_TEST(a_kernel_cannot_launch) {
  bool refused = false;
  expect_good(launch(launches, 1, 1, 0, nullptr, &refused));
  CK_TRUE(refused);
}
#endif

CK_TEST(two_threads_launch_at_once) {
  bool right[2] = {};
  std::vector<std::thread> threads;
  for (bool& result : right)
    threads.emplace_back([&result] {
      result = true;
      for (int i = 0; i < 20; ++i) {
        std::vector<int> out(128);
        if (launch(ring<true, true>, 1, 128, 128 * sizeof(int), nullptr, out.data()) != nullptr) result = false;
        for (int t = 0; t < 128; ++t) result = result && out[t] == (t + 8 * 33) % 128;
        if (launch(some_leave, 1, 128, 0, nullptr, 3) == nullptr) result = false;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CK_TRUE(right[0] && right[1]);
}

}  // namespace

CK_TEST_MAIN()
