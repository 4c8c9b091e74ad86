// Shared memory and asynchronous copies, and the mistakes that the simulation reports.
#include <vector>

#include "csrc/tests/simt.h"

namespace {

using namespace ck::cuda;
using namespace ck::test;

CK_GLOBAL(32, 1) void reads_unwritten(float* out, int floats) {
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
  expect_good(launch(reads_unwritten, 3, 32, 5 * sizeof(float), nullptr, out.data(), 5));
  for (float f : out) CK_TRUE(f != f);
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

}  // namespace

CK_TEST_MAIN()
