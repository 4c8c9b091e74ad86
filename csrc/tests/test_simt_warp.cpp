// Shuffles, votes and matrix fragments of a warp, each against results that are computed another way.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "csrc/tests/simt.h"

namespace {

using ck::bf16;
using ck::f16;
using namespace ck::cuda;
using namespace ck::test;

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

CK_GLOBAL(32, 1) void multiplies_tf32(const float* a, const float* b, float* d) {
  const unsigned group = threadIdx.x / 4, place = threadIdx.x % 4;
  uint32_t own_a[4], own_b[2];
  float own_d[4] = {};
  for (unsigned i = 0; i < 4; ++i) own_a[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + place + i / 2 * 4]);
  for (unsigned i = 0; i < 2; ++i) own_b[i] = __float_as_uint(b[(place + i * 4) * 8 + group]);
  for (int times = 0; times < 2; ++times) mma_m16n8k8(own_d, own_a, own_b);
  for (unsigned i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + place * 2 + i % 2] = own_d[i];
}

CK_TEST(matrices_of_tf32_are_multiplied_in_fragments) {
  float a[16][8], b[8][8], d[16][8];
  // Whole numbers of 11 bits, and bits that do not count.
  const auto number = [](int n) { return static_cast<float>(1024 + n * 7 % 1024); };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 8; ++k) a[m][k] = number(m * 8 + k) + 0.5f + 0.25f * static_cast<float>(k % 2);
  for (int k = 0; k < 8; ++k)
    for (int n = 0; n < 8; ++n) b[k][n] = -number(k * 31 + n * 5) - 0.875f;
  expect_good(launch(multiplies_tf32, 1, 32, 0, nullptr, &a[0][0], &b[0][0], &d[0][0]));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double expected = 0;
      for (int k = 0; k < 8; ++k) expected -= double{number(m * 8 + k)} * number(k * 31 + n * 5);
      CK_CLOSE(d[m][n], 2 * expected, 1e-6 * std::abs(expected));
    }
}

}  // namespace

CK_TEST_MAIN()
