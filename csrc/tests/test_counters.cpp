// What counters say of kernels whose accesses are known. This file is compiled with the compiler's calls in front of
// loads and stores.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "csrc/cuda/device/warpgroup.cuh"
#include "csrc/tests/check.h"

namespace {

using namespace ck::cuda;
using ck::simt::Access;
using ck::simt::Counted;
using ck::simt::Counts;
using ck::simt::Meeting;
using ck::simt::Requests;

constexpr int kFloats = 4096;

float* memory() {
  static std::vector<float> numbers(2 * kFloats);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(numbers.data()) + 127) / 128 * 128);
}

template <class... Parameters, class... Arguments>
Counts counts_of(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  Counts first{};
  for (const char* seed : {"1", "2", "3"}) {
    setenv("CONVKERNELS_SIMT_SEED", seed, 1);
    ck::simt::start_counting();
    const char* status = launch(kernel, blocks, threads, 16 * 1024, nullptr, arguments...);
    const std::vector<Counted> counted = ck::simt::stop_counting();
    if (status != nullptr) ck::test::fail("launch", 0, status);
    CK_EQUAL(counted.size(), 1u);
    CK_TRUE(counted[0].kernel == reinterpret_cast<const void*>(kernel));
    if (seed[0] == '1') first = counted[0].counts;
    CK_TRUE(first == counted[0].counts);
  }
  unsetenv("CONVKERNELS_SIMT_SEED");
  return first;
}

void check_global(const Requests& r, uint64_t requests, uint64_t bytes, uint64_t sectors) {
  CK_EQUAL(r.requests, requests);
  CK_EQUAL(r.bytes, bytes);
  CK_EQUAL(r.sectors, sectors);
  CK_EQUAL(r.wavefronts, 0u);
}

void check_shared(const Requests& r, uint64_t requests, uint64_t wavefronts, uint64_t conflicts) {
  CK_EQUAL(r.requests, requests);
  CK_EQUAL(r.wavefronts, wavefronts);
  CK_EQUAL(r.conflicts, conflicts);
  CK_EQUAL(r.sectors, 0u);
}

template <class V>
CK_GLOBAL(64, 1)
void copies(V* to, const V* from, int stride) {
  to[blockIdx.x * blockDim.x + threadIdx.x] = from[(blockIdx.x * blockDim.x + threadIdx.x) * stride];
}

CK_TEST(floats_side_by_side_fill_four_sectors) {
  const Counts c = counts_of(copies<float>, 2, 64, memory() + kFloats, memory(), 1);
  CK_EQUAL(c.blocks, 2u);
  check_global(c.of(Access::kLoad), 4, 512, 16);
  check_global(c.of(Access::kStore), 4, 512, 16);
  CK_EQUAL(c.bytes_read, 512u);
  CK_EQUAL(c.bytes_written, 512u);
}

CK_TEST(floats_apart_touch_more_sectors) {
  check_global(counts_of(copies<float>, 1, 32, memory() + kFloats, memory(), 2).of(Access::kLoad), 1, 128, 8);
  check_global(counts_of(copies<float>, 1, 32, memory() + kFloats, memory(), 32).of(Access::kLoad), 1, 128, 32);
  const Counts same = counts_of(copies<float>, 1, 32, memory() + kFloats, memory(), 0);
  check_global(same.of(Access::kLoad), 1, 128, 1);
  CK_EQUAL(same.bytes_read, 4u);
}

CK_TEST(a_warp_whose_rows_begin_within_a_sector_touches_one_more) {
  check_global(counts_of(copies<float>, 1, 32, memory() + kFloats, memory() + 1, 1).of(Access::kLoad), 1, 128, 5);
}

CK_TEST(sixteen_bytes_are_one_access) {
  auto* to = reinterpret_cast<float4*>(memory() + kFloats);
  const auto* from = reinterpret_cast<const float4*>(memory());
  const Counts c = counts_of(copies<float4>, 1, 32, to, from, 1);
  check_global(c.of(Access::kLoad), 1, 512, 16);
  check_global(c.of(Access::kStore), 1, 512, 16);
}

CK_TEST(a_part_of_a_warp_is_a_request) {
  check_global(counts_of(copies<float>, 1, 40, memory() + kFloats, memory(), 1).of(Access::kLoad), 2, 160, 5);
}

CK_DEVICE float sum_of(const float4& q) { return q.x + q.y + q.z + q.w; }

CK_GLOBAL(32, 1) void sums_parts(float* to, const float* from) {
  const float4 whole = *reinterpret_cast<const float4*>(from + threadIdx.x * 4);
  const float total = sum_of(whole);
  store_four(to + threadIdx.x * 4, total, whole.x, 0, 1);
  const bool odd = threadIdx.x % 2 != 0;
  float4* const second = reinterpret_cast<float4*>(to) + 32 + threadIdx.x;
  *second = odd ? make_float4(total, 1, 2, 3) : make_float4(0, total, 1, 2);
  second[32] = {total, 1, whole.y, 3};
}

CK_TEST(the_parts_of_a_vector_are_not_accesses) {
  const Counts c = counts_of(sums_parts, 1, 32, memory() + kFloats, memory());
  check_global(c.of(Access::kLoad), 1, 512, 16);
  check_global(c.of(Access::kStore), 3, 3 * 512, 3 * 16);
}

struct Parameters {
  float* to;
  const float* from;
  int64_t numbers[32];
};

// Lanes go through the loop a different number of times; what they share are its first rounds.
CK_GLOBAL(32, 1) void loops(const CK_PARAM Parameters p) {
  float total = 0;
  for (int i = 0; i < p.numbers[threadIdx.x]; ++i) total += p.from[i * 32 + threadIdx.x];
  p.to[threadIdx.x] = total;
}

CK_TEST(rounds_of_a_loop_are_requests_and_parameters_are_not) {
  Parameters p{memory() + kFloats, memory(), {}};
  for (int i = 0; i < 32; ++i) p.numbers[i] = i < 8 ? 3 : 1;
  const Counts c = counts_of(loops, 1, 32, p);
  check_global(c.of(Access::kLoad), 3, 4 * (32 + 2 * 8), 4 + 2);
  check_global(c.of(Access::kStore), 1, 128, 4);
}

template <class V>
CK_GLOBAL(32, 1)
void shares(float* to, int stride) {
  V* const shared = reinterpret_cast<V*>(shared_memory());
  V value{};
  shared[threadIdx.x] = value;
  __syncthreads();
  value = shared[threadIdx.x * stride % (16 * 1024 / sizeof(V))];
  reinterpret_cast<V*>(to)[threadIdx.x] = value;
}

template <class V>
Requests shared_loads(int stride) {
  const Counts c = counts_of(shares<V>, 1, 32, memory(), stride);
  CK_EQUAL(c.of(Meeting::kBarrier), 1u);
  check_shared(c.of(Access::kSharedStore), 1, sizeof(V) < 4 ? 1 : sizeof(V) / 4, 0);
  CK_EQUAL(c.of(Access::kLoad).requests, 0u);
  return c.of(Access::kSharedLoad);
}

CK_TEST(lanes_in_one_bank_wait_for_each_other) {
  check_shared(shared_loads<float>(1), 1, 1, 0);
  check_shared(shared_loads<float>(2), 1, 2, 1);
  check_shared(shared_loads<float>(32), 1, 32, 31);
  check_shared(shared_loads<float>(33), 1, 1, 0);
}

CK_TEST(lanes_that_read_one_word_do_not) {
  check_shared(shared_loads<float>(0), 1, 1, 0);
  check_shared(shared_loads<uint16_t>(1), 1, 1, 0);
  check_shared(shared_loads<uint16_t>(2), 1, 1, 0);
}

CK_TEST(wide_accesses_come_in_phases) {
  check_shared(shared_loads<uint2>(1), 1, 2, 0);
  check_shared(shared_loads<uint2>(2), 1, 4, 2);
  check_shared(shared_loads<float4>(1), 1, 4, 0);
  check_shared(shared_loads<float4>(2), 1, 8, 4);
  check_shared(shared_loads<float4>(8), 1, 32, 28);
  check_shared(shared_loads<float4>(9), 1, 4, 0);
  check_shared(shared_loads<uint2>(0), 1, 1, 0);
  check_shared(shared_loads<float4>(0), 1, 2, 0);
}

CK_TEST(wide_accesses_that_begin_within_a_word_touch_one_more) {
  alignas(128) static char shared[1024];
  for (const unsigned bytes : {8u, 16u}) {
    ck::simt::Tally tally;
    tally.begin_block(1);
    // Every two lanes ask for the same, so that phases are merged.
    for (unsigned lane = 0; lane < 32; ++lane)
      tally.add(0, lane, Access::kSharedLoad, shared, 1, shared + 2 + lane / 2 * bytes, bytes);
    tally.meet(0);
    check_shared(tally.counts.of(Access::kSharedLoad), 1, bytes == 8 ? 2 : 4, bytes == 8 ? 1 : 2);
  }
}

CK_GLOBAL(64, 1) void multiplies(float* to, int pitch) {
  float d[4] = {};
  uint32_t a[4], b[4];
  auto* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = threadIdx.x; i < 4096; i += 64) shared[i] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(a, shared + lane * pitch);
  ldmatrix_x4_trans(b, shared + lane * pitch);
  const uint32_t right[2] = {b[0], b[1]};
  mma_m16n8k16<ck::bf16>(d, a, right);
  to[threadIdx.x] = d[0] + __shfl_xor_sync(~0u, d[1], 1) + (__any_sync(~0u, lane) ? 1 : 0);
}

CK_TEST(rows_of_matrices_in_one_bank_wait_for_each_other) {
  check_shared(counts_of(multiplies, 1, 64, memory(), 64).of(Access::kMatrixLoad), 4, 4 * 32, 4 * 28);
  check_shared(counts_of(multiplies, 1, 64, memory(), 72).of(Access::kMatrixLoad), 4, 4 * 4, 0);
}

CK_TEST(what_threads_do_together_is_counted) {
  const Counts c = counts_of(multiplies, 3, 64, memory(), 72);
  CK_EQUAL(c.of(Meeting::kBarrier), 3u);
  CK_EQUAL(c.of(Meeting::kMatrixLoad), 12u);
  CK_EQUAL(c.of(Meeting::kMatrixProduct), 6u);
  CK_EQUAL(c.of(Meeting::kShuffle), 6u);
  CK_EQUAL(c.of(Meeting::kVote), 6u);
  CK_EQUAL(c.of(Meeting::kWarpBarrier), 0u);
}

CK_GLOBAL(32, 1) void copies_ahead(const float* from, int rows) {
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  cp_async<16>(shared + threadIdx.x * 4, from + threadIdx.x * 4, static_cast<int>(threadIdx.x) < rows);
  cp_async_commit();
  cp_async_wait<0>();
}

CK_TEST(copies_read_what_is_valid_and_write_all) {
  const Counts c = counts_of(copies_ahead, 1, 32, memory(), 20);
  check_global(c.of(Access::kCopyRead), 1, 20 * 16, 10);
  check_shared(c.of(Access::kCopyWrite), 1, 4, 0);
  CK_EQUAL(c.bytes_read, 320u);
  CK_EQUAL(c.of(Access::kSharedStore).requests, 0u);
}

// One thread copies for all, 192 bytes from the middle of a sector on, and back to the beginning of one.
CK_GLOBAL(32, 1) void copies_at_once(float* to, const float* from) {
  CK_SHARED(uint64_t, full, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, 192);
    bulk_load(shared_memory(), from, 192, full);
    mbarrier_wait(full, 0);
    bulk_store(to, shared_memory(), 192);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

CK_TEST(a_bulk_copy_is_a_request) {
  const Counts c = counts_of(copies_at_once, 1, 32, memory() + kFloats, memory() + 4);
  check_global(c.of(Access::kCopyRead), 1, 192, 7);
  check_global(c.of(Access::kStore), 1, 192, 6);
  check_shared(c.of(Access::kCopyWrite), 1, 2, 0);
  check_shared(c.of(Access::kSharedLoad), 1, 2, 0);
  CK_EQUAL(c.bytes_read, 192u);
  CK_EQUAL(c.bytes_written, 192u);
}

CK_GLOBAL(32, 1) void copies_a_box(const CK_PARAM TensorMap map, int at1) {
  CK_SHARED(uint64_t, full, 1);
  if (threadIdx.x != 0) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect(full, 8 * 128);
  tensor_load(shared_memory_1024(), map, 16, at1, 0, 0, full);
  mbarrier_wait(full, 0);
}

CK_TEST(a_box_has_a_request_for_each_row_of_the_tensor) {
  TensorMap map;
  // 40 of its 64 columns, from 16 on, lie in the tensor, and 5 of its 8 rows.
  CK_TRUE(make_tensor_map(map, memory(), {56, 6, 1, 1}, {128, 16, 16}, 8) == nullptr);
  const Counts c = counts_of(copies_a_box, 1, 32, map, 1);
  check_global(c.of(Access::kCopyRead), 5, 5 * 80, 5 * 3);
  check_shared(c.of(Access::kCopyWrite), 1, 8, 0);
  CK_EQUAL(c.bytes_read, 400u);
}

template <bool in_registers>
CK_GLOBAL(256, 1)
void multiplies_groups(int times) {
  float sums[16][4];
  const uint32_t registers[4] = {};
  const Operand all = operand(shared_memory_1024());
  wgmma_fence();
  for (int i = 0; i < times; ++i) {
    if constexpr (in_registers)
      wgmma<ck::bf16, 128>(sums, registers, all, false);
    else
      wgmma<ck::bf16, 128>(sums, all, all, false);
  }
  wgmma_commit();
  wgmma_wait<0>();
  barrier_sync(1, 256);
}

CK_TEST(products_of_a_warpgroup_count_in_each_warp) {
  const Counts c = counts_of(multiplies_groups<false>, 1, 256, 3), r = counts_of(multiplies_groups<true>, 1, 256, 3);
  CK_EQUAL(c.of(Meeting::kWarpgroupProduct), 8u * 16 * 3);
  CK_EQUAL(r.of(Meeting::kWarpgroupProduct), 8u * 16 * 3);
  CK_EQUAL(c.of(Meeting::kMatrixProduct), 0u);
  CK_EQUAL(c.of(Meeting::kWarpBarrier), 8u);
  CK_EQUAL(c.of(Meeting::kBarrier), 0u);
  // 16 x 16 numbers of a for each warp, and 16 x 128 of b for the first of four.
  check_shared(c.of(Access::kOperandRead), 10 * 3, (8 * 4 + 2 * 32) * 3, 0);
  check_shared(r.of(Access::kOperandRead), 2 * 3, 2 * 32 * 3, 0);
  CK_EQUAL(r.of(Access::kOperandRead).bytes, 2u * 4096 * 3);
}

}  // namespace

CK_TEST_MAIN()
