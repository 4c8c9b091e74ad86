// Copies of boxes of a tensor, products of what they bring, and the mistakes that the simulation reports.
#include <bit>
#include <vector>

#include "csrc/cuda/device/warpgroup.cuh"
#include "csrc/tests/simt.h"

namespace {

using namespace ck::cuda;
using namespace ck::test;

enum class Slip {
  kNone,
  kNoWait,
  kWrongPhase,
  kNoInitFence,
  kExpectsMore,
  kMisplaced,
  kOutside,
  kOverlaps,
  kWritesUnfenced,
  kWritesDestination,
  kLeaves
};

// A box of `rows` rows at byte 1024 of shared memory, to global memory. 8 more rows would fit.
template <Slip slip>
CK_GLOBAL(32, 1)
void copies_box(const CK_PARAM TensorMap map, int at0, int at1, int at2, int at3, int rows, uint16_t* out) {
  auto* const full = reinterpret_cast<uint64_t*>(shared_memory_1024());
  char* const box = shared_memory_1024() + 1024;
  const auto bytes = static_cast<unsigned>(rows) * 128;
  prefetch_tensor_map(map);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    if (slip != Slip::kNoInitFence) fence_mbarrier_init();
    if (slip == Slip::kWritesUnfenced) box[128] = 0;
    mbarrier_arrive_expect(full, bytes + (slip == Slip::kExpectsMore ? 128 : 0));
    char* const to = box + (slip == Slip::kMisplaced ? 512 : slip == Slip::kOutside ? 2048 : 0);
    tensor_load(to, map, at0, at1, at2, at3, full);
    if (slip == Slip::kOverlaps) tensor_load(box + 1024, map, at0, at1, at2, at3, full);
    if (slip == Slip::kWritesDestination) box[128] = 0;
  }
  __syncthreads();
  if (slip == Slip::kLeaves) return;
  if (slip != Slip::kNoWait) mbarrier_wait(full, slip == Slip::kWrongPhase);
  for (int i = static_cast<int>(threadIdx.x); i < rows * 64; i += 32) out[i] = reinterpret_cast<uint16_t*>(box)[i];
  mbarrier_wait(full, 0);
}

// A tensor of numbers that are all different, with rows that are longer than what it takes of them.
struct Tensor {
  int64_t size[4] = {72, 21, 3, 2};
  int64_t stride[3] = {80 * 2, 22 * 80 * 2, 3 * 22 * 80 * 2};
  std::vector<uint16_t> memory;
  uint16_t* data;

  Tensor() : memory(2 * 3 * 22 * 80 + 8) {
    data = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
    for (int i = 0; i < 2 * 3 * 22 * 80; ++i) data[i] = static_cast<uint16_t>(i + 1);
  }

  uint16_t number(int64_t x0, int64_t x1, int64_t x2, int64_t x3) const {
    const int64_t x[4] = {x0, x1, x2, x3};
    for (int i = 0; i < 4; ++i)
      if (x[i] < 0 || x[i] >= size[i]) return 0;
    return data[((x3 * 3 + x2) * 22 + x1) * 80 + x0];
  }
};

// The status, or whether the box is right.
template <Slip slip = Slip::kNone>
std::string box_status(int at0, int at1, int at2, int at3, int rows) {
  const Tensor tensor;
  TensorMap map;
  if (const char* why = make_tensor_map(map, tensor.data, tensor.size, tensor.stride, rows)) return why;
  std::vector<uint16_t> out(static_cast<size_t>(rows) * 64, 1);
  const size_t shared = 1024 + static_cast<size_t>(rows + 8) * 128;
  if (const char* status = launch(copies_box<slip>, 2, 32, shared, nullptr, map, at0, at1, at2, at3, rows, out.data()))
    return status;
  bool nan = true;
  for (uint16_t x : out) nan &= x == 0xFFFF;
  if (nan) return "nan";
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < 64; ++i) {
      const int swizzled = (i / 8 ^ r % 8) * 8 + i % 8;
      if (out[static_cast<size_t>(r * 64 + swizzled)] != tensor.number(at0 + i, at1 + r, at2, at3)) return "wrong";
    }
  return "right";
}

CK_TEST(boxes_are_swizzled_and_end_with_the_tensor) {
  for_seeds([] {
    for (const int rows : {1, 8, 13, 256})
      for (const int at0 : {0, 8, 64, -3, -64, 71, 72})
        for (const int at1 : {0, 5, 20, -2, -300, 21}) CK_EQUAL(box_status(at0, at1, 1, 1, rows), "right");
    for (const int at2 : {-1, 0, 2, 3})
      for (const int at3 : {-1, 0, 1, 2}) CK_EQUAL(box_status(0, 0, at2, at3, 8), "right");
  });
}

CK_TEST(mistakes_with_boxes_are_reported) {
  for_seeds([] {
    CK_EQUAL(box_status<Slip::kNoWait>(0, 0, 0, 0, 16), "nan");
    CK_EQUAL(box_status<Slip::kWrongPhase>(0, 0, 0, 0, 16), "nan");
    const auto expect = [](const std::string& status, const char* part) { expect_failure(status.c_str(), part); };
    expect(box_status<Slip::kNoInitFence>(0, 0, 0, 0, 16),
           "cp.async.bulk.tensor: neither fence.mbarrier_init nor fence.proxy.async followed the initialisation");
    // Rows outside of the tensor count as well.
    expect(box_status<Slip::kExpectsMore>(0, 12, 0, 0, 16), "1 of 1 arrivals, 2048 of 2176 bytes");
    expect(box_status<Slip::kMisplaced>(0, 0, 0, 0, 16),
           "cp.async.bulk.tensor, destination: byte 1536 of dynamic shared memory is not a multiple of 1024 bytes");
    expect(box_status<Slip::kOutside>(0, 0, 0, 0, 16), "destination: an address is not in shared memory");
    expect(box_status<Slip::kOverlaps>(0, 0, 0, 0, 16),
           "another copy to byte 2048 of dynamic shared memory is on its way");
    expect(box_status<Slip::kWritesUnfenced>(0, 0, 0, 0, 16),
           "cp.async.bulk.tensor, destination: byte 1152 of dynamic shared memory was written by a thread and no "
           "fence.proxy.async followed");
    expect(box_status<Slip::kWritesDestination>(0, 0, 0, 0, 16),
           "byte 1024 of dynamic shared memory was written while the copy was on its way");
    expect(box_status<Slip::kLeaves>(0, 0, 0, 0, 16), "the block ended before the phase");
  });
}

CK_TEST(gpus_before_9_0_have_none) {
  setenv("CONVKERNELS_SIMT_ARCH", "89", 1);
  expect_failure(box_status(0, 0, 0, 0, 8).c_str(), "sm_89, is older than bulk copies");
  unsetenv("CONVKERNELS_SIMT_ARCH");
}

CK_TEST(maps_of_other_tensors_are_refused) {
  const Tensor tensor;
  const auto refused = [&](const void* data, std::vector<int64_t> size, std::vector<int64_t> stride, int box1) {
    TensorMap map;
    const int64_t sizes[4] = {size[0], size[1], size[2], size[3]}, strides[3] = {stride[0], stride[1], stride[2]};
    const char* why = make_tensor_map(map, data, sizes, strides, box1);
    return std::string(why == nullptr ? "" : why);
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CK_EQUAL(refused(tensor.data, {8, 1, 1, 1}, {0, 0, 0}, 256), "");
  CK_EQUAL(refused(tensor.data, {8, 2, 2, 2}, {16, 16, 32}, 1), "");
  CK_TRUE(has(refused(tensor.data + 4, {8, 1, 1, 1}, {16, 16, 16}, 1), "address"));
  CK_TRUE(has(refused(nullptr, {8, 1, 1, 1}, {16, 16, 16}, 1), "address"));
  CK_TRUE(has(refused(tensor.data, {8, 0, 1, 1}, {16, 16, 16}, 1), "sizes"));
  CK_TRUE(has(refused(tensor.data, {8, 1, 1, (int64_t{1} << 32) + 1}, {16, 16, 16}, 1), "sizes"));
  CK_TRUE(has(refused(tensor.data, {8, 2, 1, 1}, {24, 16, 16}, 1), "strides"));
  CK_TRUE(has(refused(tensor.data, {8, 1, 2, 1}, {16, 0, 16}, 1), "strides"));
  CK_TRUE(has(refused(tensor.data, {8, 1, 1, 2}, {16, 16, -16}, 1), "strides"));
  CK_TRUE(has(refused(tensor.data, {8, 1, 1, 2}, {16, 16, int64_t{1} << 40}, 1), "strides"));
  CK_TRUE(has(refused(tensor.data, {8, 1, 1, 1}, {16, 16, 16}, 0), "box"));
  CK_TRUE(has(refused(tensor.data, {8, 1, 1, 1}, {16, 16, 16}, 257), "box"));
}

constexpr int kRows = 100, kColumns = 128, kLength = 616;  // of which a product sums up to 64 at a time

enum class Flow { kRight, kNoFullWait, kReleasesEarly, kNeverReleases };

// out [kRows, kColumns] = a [kRows, kLength] b [kLength, kColumns]. The first warpgroup fetches what two others
// multiply, 64 rows each.
template <Flow flow>
CK_GLOBAL(384, 1)
void flows(const CK_PARAM TensorMap a, const CK_PARAM TensorMap b, float* out) {
  constexpr int kSlots = 2, kSteps = (kLength + 63) / 64, kBytesA = 128 * 128, kBytes = kBytesA + 128 * 128;
  auto* const full = reinterpret_cast<uint64_t*>(shared_memory_1024());
  uint64_t* const empty = full + kSlots;
  char* const slots = shared_memory_1024() + 1024;
  const int t = static_cast<int>(threadIdx.x), group = t / 128, warp = t / 32 % 4, lane = t % 32;
  if (t == 0) {
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 8);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (group == 0) {
    give_registers<24>();
    for (int step = 0; step < kSteps && t == 0; ++step) {
      char* const slot = slots + step % kSlots * kBytes;
      if (step >= kSlots) mbarrier_wait(empty + step % kSlots, (step / kSlots - 1) % 2u);
      mbarrier_arrive_expect(full + step % kSlots, kBytes);
      tensor_load(slot, a, step * 64, 0, 0, 0, full + step % kSlots);
      for (int half = 0; half < 2; ++half)
        tensor_load(slot + kBytesA + half * 64 * 128, b, half * 64, step * 64, 0, 0, full + step % kSlots);
    }
    return;
  }
  take_registers<240>();
  float sums[16][4];
  const auto release = [&](int step) {
    if (lane == 0 && flow != Flow::kNeverReleases) mbarrier_arrive(empty + step % kSlots);
  };
  for (int step = 0; step < kSteps; ++step) {
    char* const slot = slots + step % kSlots * kBytes;
    if (flow != Flow::kNoFullWait) mbarrier_wait(full + step % kSlots, step / kSlots % 2u);
    wgmma_fence();
    for (int i = 0; i < 4; ++i)
      wgmma<ck::bf16, 128, Major::kSummed, Major::kOther>(sums, operand(slot + (group - 1) * 64 * 128 + i * 32),
                                                          operand(slot + kBytesA + i * 2048, 64 * 128),
                                                          step > 0 || i > 0);
    wgmma_commit();
    if (flow == Flow::kReleasesEarly) release(step);
    wgmma_wait<1>();
    if (flow != Flow::kReleasesEarly && step > 0) release(step - 1);
  }
  wgmma_wait<0>();
  for (int x = 0; x < 16; ++x)
    for (int e = 0; e < 4; ++e) {
      const int row = (group - 1) * 64 + warp * 16 + lane / 4 + e / 2 * 8;
      if (row < kRows) out[row * kColumns + x * 8 + lane % 4 * 2 + e % 2] = sums[x][e];
    }
}

template <Flow flow>
std::string flow_status() {
  constexpr int kPadded = kLength + 8;
  alignas(16) static uint16_t a[kRows * kPadded], b[kLength * kColumns];
  const auto number_a = [](int m, int k) { return (m * 5 + k * 3) % 9 - 4; };
  const auto number_b = [](int k, int n) { return (k * 7 + n * 2) % 11 - 5; };
  // Whole numbers as small as these have no more than the first 16 bits.
  const auto bits = [](int x) { return static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16); };
  for (int m = 0; m < kRows; ++m)
    for (int k = 0; k < kPadded; ++k) a[m * kPadded + k] = k < kLength ? bits(number_a(m, k)) : uint16_t{0xFFFF};
  for (int i = 0; i < kLength * kColumns; ++i) b[i] = bits(number_b(i / kColumns, i % kColumns));
  TensorMap map_a, map_b;
  make_tensor_map(map_a, a, {kLength, kRows, 1, 1}, {kPadded * 2, 16, 16}, 128);
  make_tensor_map(map_b, b, {kColumns, kLength, 1, 1}, {kColumns * 2, 16, 16}, 64);
  std::vector<float> out(kRows * kColumns);
  if (const char* status = launch(flows<flow>, 1, 384, 1024 + 2 * 256 * 128, nullptr, map_a, map_b, out.data()))
    return status;
  for (int i = 0; i < kRows * kColumns; ++i) {
    float expected = 0;
    for (int k = 0; k < kLength; ++k)
      expected += static_cast<float>(number_a(i / kColumns, k) * number_b(k, i % kColumns));
    if (!(out[static_cast<size_t>(i)] == expected)) return "wrong";
  }
  return "right";
}

CK_TEST(boxes_flow_into_products) {
  int early = 0;
  for_seeds([&] {
    CK_EQUAL(flow_status<Flow::kRight>(), "right");
    CK_TRUE(flow_status<Flow::kNoFullWait>() != "right");
    early += flow_status<Flow::kReleasesEarly>() != "right";
    expect_failure(flow_status<Flow::kNeverReleases>().c_str(), "; phase 0 of the mbarrier at byte ");
  });
  CK_EQUAL(early, 5);
}

}  // namespace

CK_TEST_MAIN()
