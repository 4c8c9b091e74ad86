// mbarriers and bulk copies, and the mistakes that the simulation reports.
#include <vector>

#include "csrc/tests/simt.h"

namespace {

using namespace ck::cuda;
using namespace ck::test;

// Thread t waits for its turn: phase t of an mbarrier that its predecessor completes.
CK_GLOBAL(64, 1) void takes_turns(int* order) {
  CK_SHARED(uint64_t, turn, 1);
  CK_SHARED(int, count, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(turn, 1);
    count[0] = 0;
  }
  __syncthreads();
  const unsigned mine = threadIdx.x;
  // Phases before the last one have to be waited for too: only the parity of a phase is known.
  for (unsigned phase = 0; phase < mine; ++phase) {
    mbarrier_wait(turn, phase % 2);
    __syncthreads();
  }
  order[mine] = count[0]++;
  mbarrier_arrive(turn);
  for (unsigned phase = mine; phase < blockDim.x - 1; ++phase) __syncthreads();
}

CK_TEST(phases_are_completed_by_arrivals) {
  for_seeds([] {
    std::vector<int> order(20, -1);
    expect_good(launch(takes_turns, 2, 20, 0, nullptr, order.data()));
    for (int i = 0; i < 20; ++i) CK_EQUAL(order[i], i);
  });
}

// What is asked of an mbarrier of `count` arrivals.
enum class Ask { kNothing, kEarly, kTwice, kTooMany, kInvalid, kOverwritten, kReused, kOutside, kMisaligned, kMissing };

CK_GLOBAL(32, 1) void asks(Ask ask, unsigned count, bool* done) {
  auto* const mbarrier = reinterpret_cast<uint64_t*>(shared_memory());
  mbarrier_init(mbarrier, count);
  done[0] = mbarrier_try_wait(mbarrier, 1);  // the phase before the first one
  for (unsigned i = 1; i < count; ++i) mbarrier_arrive(mbarrier);
  if (ask == Ask::kTwice) mbarrier_init(mbarrier, count);
  if (ask == Ask::kOverwritten) *mbarrier = 0;
  if (ask == Ask::kOutside) mbarrier_arrive(reinterpret_cast<uint64_t*>(done));
  if (ask == Ask::kMisaligned) mbarrier_arrive(reinterpret_cast<uint64_t*>(shared_memory() + 4));
  if (ask == Ask::kMissing) mbarrier_arrive(mbarrier + 1);
  if (ask == Ask::kEarly) mbarrier_wait(mbarrier, 0);
  mbarrier_expect(mbarrier, 16);
  if (ask == Ask::kInvalid || ask == Ask::kReused) {
    mbarrier_invalidate(mbarrier);
    if (ask == Ask::kReused) mbarrier_init(mbarrier, 3);
    mbarrier_arrive(mbarrier);
    if (ask == Ask::kReused) mbarrier_wait(mbarrier, 0);
  }
  mbarrier_arrive(mbarrier);
  if (ask == Ask::kTooMany) mbarrier_arrive(mbarrier);
  done[1] = true;
}

CK_TEST(older_gpus_have_none) {
  setenv("CONVKERNELS_SIMT_ARCH", "89", 1);
  expect_failure(launch(asks, 1, 1, 16, nullptr, Ask::kNothing, 1u, nullptr), "sm_89, is older than bulk copies");
  unsetenv("CONVKERNELS_SIMT_ARCH");
}

CK_TEST(mistakes_with_mbarriers_are_reported) {
  for_seeds([] {
    alignas(8) bool done[2] = {};
    const auto asked = [&](Ask ask, unsigned count = 4) {
      return launch(asks, 1, 1, 16, nullptr, ask, count, static_cast<bool*>(done));
    };
    expect_good(asked(Ask::kNothing));
    CK_TRUE(done[0] && done[1]);
    expect_failure(asked(Ask::kNothing, 0), "mbarrier.init: expected 1 to 1048575 arrivals, got 0");
    expect_failure(asked(Ask::kNothing, 1u << 20), "got 1048576");
    expect_failure(asked(Ask::kEarly),
                   "block (0,0,0): 1 thread waits at mbarrier.try_wait, 0 have exited; phase 0 of the mbarrier at byte "
                   "0 of dynamic shared memory: 3 of 4 arrivals, 0 of 0 bytes");
    expect_failure(asked(Ask::kTwice), "there already is an mbarrier at byte 0 of dynamic shared memory");
    expect_failure(asked(Ask::kOverwritten), "the mbarrier at byte 0 of dynamic shared memory was overwritten");
    expect_failure(asked(Ask::kOutside), "mbarrier.arrive: an address is not in shared memory");
    expect_failure(asked(Ask::kMisaligned), "mbarrier.arrive: an address is not a multiple of 8");
    expect_failure(asked(Ask::kMissing), "mbarrier.arrive: there is no mbarrier at byte 8");
    expect_failure(asked(Ask::kTooMany), "more than the 4 arrivals of a phase");
    expect_failure(asked(Ask::kInvalid), "mbarrier.arrive: there is no mbarrier at byte 0");
    expect_failure(asked(Ask::kReused), "1 of 3 arrivals, 0 of 0 bytes");
  });
}

enum class Slip {
  kNone,
  kNoWait,
  kWrongPhase,
  kNoLoop,
  kExpectsMore,
  kExpectsLess,
  kRefillsEarly,
  kNoInitFence,
  kWritesUnfenced,
  kWritesDestination,
  kTwice,
  kLeaves
};

// Adds up the tiles of a vector, 512 bytes at a time in two copies, while the next tiles are on their way.
template <Slip slip>
CK_GLOBAL(64, 1)
void pipeline(const float* in, int steps, float* out) {
  constexpr int kTile = 128, kSlots = 3;
  float* const tiles = reinterpret_cast<float*>(shared_memory());
  CK_SHARED(uint64_t, full, kSlots);
  const int t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int step) {
    if (t != 0 || step >= steps) return;
    const int slot = step % kSlots;
    float* const to = tiles + slot * kTile;
    unsigned expected = 4 * kTile;
    if (slip == Slip::kExpectsMore && step == 4) expected += 16;
    if (slip == Slip::kExpectsLess && step == 4) expected -= 16;
    mbarrier_arrive_expect(full + slot, expected);
    bulk_load(to, in + step * kTile, 4 * kTile - 64, full + slot);
    bulk_load(to + kTile - 16, in + step * kTile + kTile - 16, 64, full + slot);
    if (slip == Slip::kWritesDestination && step == 4) to[5] = 0;
    if (slip == Slip::kTwice && step == 4) bulk_load(to, in, 16, full + slot);
  };
  if (t == 0) {
    for (int i = 0; i < kSlots; ++i) mbarrier_init(full + i, 1);
    if (slip != Slip::kNoInitFence) fence_mbarrier_init();
  }
  __syncthreads();
  for (int step = 0; step < kSlots - 1; ++step) fetch(step);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (slip == Slip::kRefillsEarly) fetch(step + kSlots);
    const int slot = step % kSlots;
    const unsigned phase = step / kSlots % 2;
    // Half of the threads wait in vain, or not at all.
    const bool slips = t < 32;
    if (slip == Slip::kWrongPhase && slips)
      mbarrier_wait(full + slot, phase ^ 1u);
    else if (slip == Slip::kNoLoop)
      mbarrier_try_wait(full + slot, phase);
    else if (slip != Slip::kNoWait || !slips)
      mbarrier_wait(full + slot, phase);
    if (slip == Slip::kLeaves && step == 1) return;
    float* const tile = tiles + slot * kTile;
    sum += tile[t] + tile[kTile - 1 - t];
    if (slip == Slip::kWritesUnfenced && step == 1) tile[t] = 0.1f;
    __syncthreads();
    // What was read before the barrier, in the step before, is free.
    if (slip != Slip::kRefillsEarly) fetch(step + kSlots - 1);
  }
  out[t] = sum;
}

// The status, or whether all sums are right.
template <Slip slip>
std::string pipeline_status() {
  constexpr int kSteps = 8;
  alignas(16) static float in[kSteps * 128];
  float out[64];
  for (int i = 0; i < kSteps * 128; ++i) in[i] = static_cast<float>(i);
  const char* status =
      launch(pipeline<slip>, 1, 64, 3 * 512, nullptr, static_cast<const float*>(in), kSteps, static_cast<float*>(out));
  if (status != nullptr) return status;
  // Numbers t and 127 - t of tile s are together 256 s + 127.
  for (float sum : out)
    if (sum != 256.0f * 28 + 127 * 8) return "wrong";
  return "right";
}

CK_TEST(bulk_copies_come_when_their_phase_is_waited_for) {
  int early = 0;
  for_seeds([&] {
    CK_EQUAL(pipeline_status<Slip::kNone>(), "right");
    CK_EQUAL(pipeline_status<Slip::kNoWait>(), "wrong");
    CK_TRUE(pipeline_status<Slip::kWrongPhase>() != "right");  // or nobody goes on
    CK_EQUAL(pipeline_status<Slip::kNoLoop>(), "wrong");
    early += pipeline_status<Slip::kRefillsEarly>() != "right";
    expect_failure(pipeline_status<Slip::kExpectsMore>().c_str(),
                   "64 threads wait at mbarrier.try_wait, 0 have exited; phase 1 of the mbarrier at byte 8 of a static "
                   "array: 1 of 1 arrivals, 512 of 528 bytes");
    expect_failure(pipeline_status<Slip::kExpectsLess>().c_str(),
                   "phase 1 of the mbarrier at byte 8 of a static array: 1 of 1 arrivals, 512 of 496 bytes");
    expect_failure(pipeline_status<Slip::kNoInitFence>().c_str(),
                   "neither fence.mbarrier_init nor fence.proxy.async followed the initialisation");
    expect_failure(pipeline_status<Slip::kWritesUnfenced>().c_str(),
                   "cp.async.bulk, destination: byte 512 of dynamic shared memory was written by a thread and no "
                   "fence.proxy.async followed");
    expect_failure(pipeline_status<Slip::kWritesDestination>().c_str(),
                   "byte 512 of dynamic shared memory was written while the copy was on its way");
    expect_failure(pipeline_status<Slip::kTwice>().c_str(), "another copy to byte 512 of dynamic shared memory");
    expect_failure(pipeline_status<Slip::kLeaves>().c_str(), "the block ended before the phase");
  });
  CK_EQUAL(early, 5);
}

enum class Store { kRight, kNoFence, kFenceFirst, kNoBarrier, kOverwrites, kWaitsForOneTooFew, kLeaves };

// Doubles a vector, 256 bytes at a time, in two buffers.
template <Store slip>
CK_GLOBAL(64, 1)
void doubles(const float* in, int steps, float* out) {
  float* const tiles = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  for (int step = 0; step < steps; ++step) {
    float* const tile = tiles + step % 2 * 64;
    if (slip == Store::kWaitsForOneTooFew)
      bulk_wait_read<2>();
    else if (slip != Store::kOverwrites)
      bulk_wait_read<1>();  // of the thread that stores
    __syncthreads();
    if (slip == Store::kFenceFirst) fence_async_proxy();
    tile[t] = 2 * in[step * 64 + t];
    if (slip != Store::kNoFence && slip != Store::kFenceFirst) fence_async_proxy();
    if (slip != Store::kNoBarrier) __syncthreads();
    if (t == 0) bulk_store(out + step * 64, tile, 256);
    bulk_commit();
  }
  if (slip == Store::kLeaves) return;
  if (slip == Store::kRight)
    bulk_wait<0>();
  else
    bulk_wait_read<0>();
}

template <Store slip>
std::string store_status() {
  alignas(16) static float in[5 * 64], out[5 * 64];
  for (int i = 0; i < 5 * 64; ++i) in[i] = static_cast<float>(i), out[i] = 0;
  const char* status =
      launch(doubles<slip>, 1, 64, 512, nullptr, static_cast<const float*>(in), 5, static_cast<float*>(out));
  if (status != nullptr) return status;
  for (int i = 0; i < 5 * 64; ++i)
    if (out[i] != 2.0f * i) return "wrong";
  return "right";
}

CK_TEST(bulk_stores_take_what_was_fenced_and_stays) {
  int before = 0;
  for_seeds([&] {
    CK_EQUAL(store_status<Store::kRight>(), "right");
    expect_failure(store_status<Store::kNoFence>().c_str(), "source: byte 0 of dynamic shared memory was written");
    expect_failure(store_status<Store::kFenceFirst>().c_str(), "no fence.proxy.async followed");
    before += store_status<Store::kNoBarrier>() != "right";
    expect_failure(store_status<Store::kOverwrites>().c_str(), "was written before cp.async.bulk.wait_group.read");
    expect_failure(store_status<Store::kWaitsForOneTooFew>().c_str(),
                   "byte 0 of dynamic shared memory was written before cp.async.bulk.wait_group.read");
    expect_failure(store_status<Store::kLeaves>().c_str(), "a thread ended before what it stores had been read");
  });
  CK_EQUAL(before, 5);
}

CK_GLOBAL(32, 1) void copies(bool load, int shared, const char* global, unsigned bytes) {
  CK_SHARED(uint64_t, full, 1);
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  char* const at = shared_memory() + shared;
  if (load) {
    mbarrier_arrive_expect(full, bytes);
    bulk_load(at, global != nullptr ? global : shared_memory(), bytes, full);
    mbarrier_wait(full, 0);
  } else {
    bulk_store(const_cast<char*>(global != nullptr ? global : shared_memory()), at, bytes);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

CK_TEST(misplaced_bulk_copies_are_reported) {
  alignas(16) static char memory[128];
  for (const bool load : {true, false}) {
    const auto copied = [&](int shared, const char* global, unsigned bytes) {
      return launch(copies, 1, 1, 64, nullptr, load, shared, global, bytes);
    };
    const std::string inside = load ? "destination: " : "source: ", outside = load ? "source: " : "destination: ";
    expect_good(copied(16, memory + 32, 48));
    expect_failure(copied(8, memory, 16), inside + "an address is not a multiple of 16");
    expect_failure(copied(0, memory + 4, 16), outside + "an address is not a multiple of 16");
    expect_failure(copied(0, memory, 24), "the size must be a multiple of 16 bytes, got 24");
    expect_failure(copied(16, memory, 64), inside + "an address is not in shared memory");
    expect_failure(copied(16, nullptr, 16), outside + "an address is in shared memory");
  }
}

}  // namespace

CK_TEST_MAIN()
