// The CPU versions of the CUDA primitives, each against results that are computed another way, and the mistakes they
// are there to find. With `nvcc -x cu` this file shows that the same kernels compile for a GPU.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cuda/device/primitives.cuh"
#include "csrc/tests/check.h"

namespace {

using ck::bf16;
using ck::f16;
using namespace ck::cuda;

constexpr unsigned kFull = ~0u;

void expect_good(const char* status) {
  if (status != nullptr) ck::test::fail("launch", 0, status);
}

void expect_failure(const char* status, const std::string& part) {
  const std::string text = status == nullptr ? "success" : status;
  if (text.find(part) == std::string::npos)
    ck::test::fail("launch", 0, "expected a status with '" + part + "', got '" + text + "'");
}

template <class Body>
void for_seeds(Body body) {
  for (int seed = 0; seed < 5; ++seed) {
    setenv("CONVKERNELS_SIMT_SEED", std::to_string(seed).c_str(), 1);
    body();
  }
  unsetenv("CONVKERNELS_SIMT_SEED");
}

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

CK_GLOBAL(32, 1) void reads_what_nobody_wrote(float* out, int floats) {
  CK_SHARED(float, fixed, 3);
  float* const shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < floats; ++i) out[i] = shared[i];
    for (int i = 0; i < 3; ++i) out[floats + i] = fixed[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < floats; ++i) shared[i] = 1;
    for (int i = 0; i < 3; ++i) fixed[i] = 1;
  }
}

CK_TEST(shared_memory_is_nan_before_each_block) {
  std::vector<float> out(8);
  expect_good(launch(reads_what_nobody_wrote, 3, 32, 5 * sizeof(float), nullptr, out.data(), 5));
  for (float f : out) CK_TRUE(f != f);
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
  // And nothing of it is left behind.
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

template <class T>
CK_GLOBAL(64, 1)
void shuffles(T* out, int argument, int width) {
  const T own = static_cast<T>(threadIdx.x + 100);
  T* const mine = out + 4 * threadIdx.x;
  mine[0] = __shfl_sync(kFull, own, argument, width);
  mine[1] = __shfl_up_sync(kFull, own, argument, width);
  mine[2] = __shfl_down_sync(kFull, own, argument, width);
  mine[3] = __shfl_xor_sync(kFull, own, argument, width);
}

template <class T>
void check_shuffles() {
  for (int width : {32, 16, 8, 2})
    for (int argument : {0, 1, 3, 7, 12, 31}) {
      std::vector<T> out(4 * 64);
      expect_good(launch(shuffles<T>, 1, 64, 0, nullptr, out.data(), argument, width));
      for (int t = 0; t < 64; ++t) {
        const int group = t / width * width, place = t % width;
        const int up = place >= argument ? t - argument : t, down = place + argument < width ? t + argument : t;
        const int other = t / 32 * 32 + (t % 32 ^ argument);
        CK_EQUAL(out[4 * t], static_cast<T>(100 + group + argument % width));
        CK_EQUAL(out[4 * t + 1], static_cast<T>(100 + up));
        CK_EQUAL(out[4 * t + 2], static_cast<T>(100 + down));
        CK_EQUAL(out[4 * t + 3], static_cast<T>(100 + (other < group + width ? other : t)));
      }
    }
}

CK_TEST(shuffles_read_the_lane_they_name) {
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<int64_t>();
  check_shuffles<uint64_t>();
}

template <int wrong>
CK_GLOBAL(256, 1)
void totals(const float* in, float* out) {
  CK_SHARED(float, parts, 8);
  const unsigned t = threadIdx.x;
  float sum = in[t];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(kFull, sum, by == 4 ? by + 4 * wrong : by);
  if (t % 32 == 0) parts[t / 32] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < 8 ? parts[t] : 0.0f;
    for (int by = 4; by > 0; by /= 2) sum += __shfl_down_sync(kFull, sum, by, 8);
    if (t == 0) out[0] = sum;
  }
}

CK_TEST(a_block_sums_by_shuffles) {
  std::vector<float> in(256);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<float>(i * i % 1009);
  double expected = 0;
  for (float f : in) expected += f;
  for_seeds([&] {
    float right = 0, wrong = 0;
    expect_good(launch(totals<0>, 1, 256, 0, nullptr, in.data(), &right));
    expect_good(launch(totals<1>, 1, 256, 0, nullptr, in.data(), &wrong));
    CK_EQUAL(right, expected);
    CK_TRUE(wrong != expected);
  });
}

CK_GLOBAL(64, 1) void votes(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  unsigned* const mine = out + 6 * threadIdx.x;
  mine[0] = __ballot_sync(kFull, threadIdx.x % 5 == 0);
  mine[1] = __any_sync(kFull, lane == 9);
  mine[2] = __any_sync(kFull, 0);
  mine[3] = __all_sync(kFull, 1);
  mine[4] = __all_sync(kFull, lane != 9);
  // Halves of a warp go their own ways.
  if (lane < 20)
    mine[5] = __ballot_sync(0x000fffffu, lane % 2);
  else
    mine[5] = static_cast<unsigned>(__shfl_sync(0xfff00000u, lane, 21)) + __all_sync(0xfff00000u, lane >= 20);
  __syncwarp();
}

CK_TEST(votes_gather_the_lanes_of_the_mask) {
  for_seeds([] {
    std::vector<unsigned> out(6 * 64);
    expect_good(launch(votes, 1, 64, 0, nullptr, out.data()));
    for (unsigned t = 0; t < 64; ++t) {
      unsigned fifths = 0;
      for (unsigned lane = 0; lane < 32; ++lane) fifths |= ((t / 32 * 32 + lane) % 5 == 0 ? 1u : 0u) << lane;
      const unsigned expected[] = {fifths, 1, 0, 1, 0, t % 32 < 20 ? 0x000aaaaau : 22u};
      for (int i = 0; i < 6; ++i) CK_EQUAL(out[6 * t + i], expected[i]);
    }
  });
}

enum class Slip { kNone, kNoWait, kWaitsForOneTooFew, kNoBarrier };

// Adds up the tiles of a vector, whose last one is incomplete, while the next tile is on its way.
template <int Bytes, Slip slip>
CK_GLOBAL(64, 1)
void pipeline(const float* in, int n, float* out) {
  constexpr int kFloats = Bytes / 4, kTile = 64 * kFloats;
  float* const tiles = reinterpret_cast<float*>(shared_memory());
  const int own = static_cast<int>(threadIdx.x) * kFloats, steps = (n + kTile - 1) / kTile;
  const auto fetch = [&](int step) {
    const int from = step * kTile + own;
    cp_async<Bytes>(tiles + step % 2 * kTile + own, in + from, from < n);
    cp_async_commit();
  };
  float sum[kFloats] = {};
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    fetch(step + 1);
    if (slip == Slip::kWaitsForOneTooFew)
      cp_async_wait<2>();
    else if (slip != Slip::kNoWait)
      cp_async_wait<1>();
    if (slip != Slip::kNoBarrier) __syncthreads();
    for (int i = 0; i < kFloats; ++i) sum[i] += tiles[step % 2 * kTile + (own + i * 65) % kTile];
    __syncthreads();
  }
  for (int i = 0; i < kFloats; ++i) out[own + i] = sum[i];
}

template <int Bytes, Slip slip>
bool pipeline_is_right() {
  constexpr int floats = Bytes / 4, tile = 64 * floats;
  const int n = 3 * tile + 16 * floats;
  std::vector<float> in(n), out(tile);
  for (int i = 0; i < n; ++i) in[i] = static_cast<float>(i);
  expect_good(launch(pipeline<Bytes, slip>, 1, 64, 2 * tile * sizeof(float), nullptr, in.data(), n, out.data()));
  bool right = true;
  for (int t = 0; t < 64; ++t)
    for (int i = 0; i < floats; ++i) {
      float expected = 0;
      for (int from = (t * floats + i * 65) % tile; from < n; from += tile) expected += in[from];
      right = right && out[t * floats + i] == expected;
    }
  return right;
}

CK_TEST(copies_arrive_when_they_are_waited_for) {
  for_seeds([] {
    CK_TRUE((pipeline_is_right<4, Slip::kNone>()));
    CK_TRUE((pipeline_is_right<8, Slip::kNone>()));
    CK_TRUE((pipeline_is_right<16, Slip::kNone>()));
    CK_TRUE((!pipeline_is_right<16, Slip::kNoWait>()));
    CK_TRUE((!pipeline_is_right<4, Slip::kWaitsForOneTooFew>()));
    CK_TRUE((!pipeline_is_right<8, Slip::kNoBarrier>()));
  });
}

CK_GLOBAL(32, 1) void copies(const char* from, int offset, int source_offset, bool to_shared, char* out) {
  char* const to = to_shared ? shared_memory() : out;
  cp_async<16>(to + offset, from + source_offset, false);
  cp_async_commit();
  cp_async_wait<0>();
}

CK_TEST(misplaced_copies_are_reported) {
  alignas(16) char from[64] = {}, out[64] = {};
  expect_good(launch(copies, 1, 1, 64, nullptr, nullptr, 48, 1 << 20, true, out));
  expect_failure(launch(copies, 1, 1, 64, nullptr, from, 8, 0, true, out), "destination: an address is not a multiple");
  expect_failure(launch(copies, 1, 1, 64, nullptr, from, 0, 4, true, out),
                 "source: an address is not a multiple of 16");
  expect_failure(launch(copies, 1, 1, 64, nullptr, from, 64, 0, true, out), "not in shared memory");
  expect_failure(launch(copies, 1, 1, 64, nullptr, from, 0, 0, false, out), "not in shared memory");
}

template <bool transposed>
CK_GLOBAL(32, 1)
void loads(uint32_t* out, int shift) {
  char* const shared = shared_memory();
  const unsigned t = threadIdx.x;
  uint16_t* const numbers = reinterpret_cast<uint16_t*>(shared);
  for (unsigned i = t; i < 256; i += 32) numbers[i] = static_cast<uint16_t>(i);
  __syncwarp();
  const char* const row = shared + 16 * (31 - t) + shift;  // in reverse order
  uint32_t r[4];
  if constexpr (transposed)
    ldmatrix_x4_trans(r, row);
  else
    ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) out[4 * t + i] = r[i];
}

template <bool transposed>
void check_loads() {
  std::vector<uint32_t> out(32 * 4);
  expect_good(launch(loads<transposed>, 1, 32, 512, nullptr, out.data(), 0));
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        if (transposed) std::swap(row, column);
        CK_EQUAL(out[4 * lane + i] >> 16 * half & 0xffff, 8 * (31 - (8 * i + row)) + column);
      }
  expect_failure(launch(loads<transposed>, 1, 32, 512, nullptr, out.data(), 8), "not a multiple of 16");
  expect_failure(launch(loads<transposed>, 1, 32, 512, nullptr, out.data(), 16), "not in shared memory");
}

CK_TEST(matrices_are_loaded_in_fragments) {
  check_loads<false>();
  check_loads<true>();
}

template <class T>
CK_GLOBAL(32, 1)
void multiplies(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t own_a[4], own_b[2];
  float own_d[4];
  for (int i = 0; i < 4; ++i) own_a[i] = a[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) own_b[i] = b[2 * threadIdx.x + i];
  for (int i = 0; i < 4; ++i) own_d[i] = d[4 * threadIdx.x + i];
  mma_m16n8k16<T>(own_d, own_a, own_b);
  for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = own_d[i];
}

// Small whole numbers over 8, some of them subnormal in float16 after the factor.
template <class T>
uint32_t encode(int eighths, bool tiny) {
  if (tiny) return std::is_same_v<T, f16> ? static_cast<uint32_t>(eighths < 0 ? 0x8000 - eighths : eighths) : 0;
  const float f = static_cast<float>(eighths) / 8;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::is_same_v<T, bf16>) return bits >> 16;
  return eighths == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10));
}

template <class T>
double decode(int eighths, bool tiny) {
  return tiny ? (std::is_same_v<T, f16> ? std::ldexp(eighths, -24) : 0.0) : eighths / 8.0;
}

// Where the PTX ISA puts the elements of mma.m16n8k16, said with its words: i counts the elements of a thread.
int row_of_a(int lane, int i) { return lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8); }
int column_of_a(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
int row_of_b(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
int row_of_d(int lane, int i) { return lane / 4 + (i < 2 ? 0 : 8); }

template <class T>
void check_multiplies() {
  const auto a = [](int m, int k) { return (m * 7 + k * 3) % 23 - 11; };
  const auto b = [](int k, int n) { return (k * 5 + n * 11) % 19 - 9; };
  const auto tiny = [](int m, int k) { return (m + k) % 5 == 0; };
  std::vector<uint32_t> as(32 * 4), bs(32 * 2);
  std::vector<float> ds(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int m = row_of_a(lane, i), k = column_of_a(lane, i);
      as[4 * lane + i / 2] |= encode<T>(a(m, k), tiny(m, k)) << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i)
      bs[2 * lane + i / 2] |= encode<T>(b(row_of_b(lane, i), lane / 4), false) << 16 * (i % 2);
    for (int i = 0; i < 4; ++i) ds[4 * lane + i] = static_cast<float>(row_of_d(lane, i));
  }
  expect_good(launch(multiplies<T>, 1, 32, 0, nullptr, as.data(), bs.data(), ds.data()));
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int m = row_of_d(lane, i), n = lane % 4 * 2 + (i & 1);
      float expected = static_cast<float>(m);
      for (int k = 0; k < 16; ++k)
        expected += static_cast<float>(decode<T>(a(m, k), tiny(m, k)) * decode<T>(b(k, n), false));
      CK_EQUAL(ds[4 * lane + i], expected);
    }
}

CK_TEST(matrices_are_multiplied_in_fragments) {
  check_multiplies<bf16>();
  check_multiplies<f16>();
}

#if defined(CK_SIMT)
CK_GLOBAL(64, 1) void throws_exceptions(int* destroyed) {
  struct Guard {
    int* count;
    ~Guard() { ++*count; }
  } guard{destroyed};
  __syncwarp();
  if (threadIdx.x == 40) throw std::invalid_argument("thread 40 is unhappy");
  __syncthreads();
}

CK_TEST(exceptions_become_a_status_and_every_thread_is_unwound) {
  int destroyed = 0;
  const char* const status = launch(throws_exceptions, 3, 64, 0, nullptr, &destroyed);
  expect_failure(status, "thread (40,0,0): thread 40 is unhappy");
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
