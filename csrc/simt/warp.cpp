#include "csrc/simt/warp.h"

#include <bit>
#include <cstring>
#include <string>

#include "csrc/simt/block.h"
#include "csrc/simt/lanes.h"

namespace ck::simt {
namespace {

constexpr unsigned kAll = ~0u;

struct Shuffled {
  uint64_t bits;
  int source;
  uint64_t result;
};

// The lane that the PTX ISA has shfl.sync read.
int source_of(Shuffle mode, int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = first | (width - 1), by = argument & 31;
  int source = lane;
  switch (mode) {
    case Shuffle::kIndex: return first | (by & (width - 1));
    case Shuffle::kUp: source = lane - by; break;
    case Shuffle::kDown: source = lane + by; break;
    case Shuffle::kXor: source = lane ^ by; break;
  }
  const bool inside = mode == Shuffle::kUp ? source >= first : source <= last;
  return inside ? source : lane;
}

void finish_shuffle(void* const* operands, unsigned lanes) {
  for_each_lane<Shuffled>(operands, lanes, [&](int lane, Shuffled& own) {
    if ((lanes >> own.source & 1) == 0)
      fail("a shuffle of lane " + std::to_string(lane) + " reads lane " + std::to_string(own.source) +
           ", which the mask does not name");
    own.result = static_cast<const Shuffled*>(operands[own.source])->bits;
  });
}

struct Voted {
  bool predicate;
  unsigned result;
};

void finish_vote(void* const* operands, unsigned lanes) {
  unsigned ballot = 0;
  for_each_lane<Voted>(operands, lanes, [&](int lane, const Voted& v) { ballot |= unsigned{v.predicate} << lane; });
  for_each_lane<Voted>(operands, lanes, [&](int, Voted& v) { v.result = ballot; });
}

struct Loaded {
  uint32_t* registers;
  const void* row;
};

template <bool transposed>
void finish_load(void* const* operands, unsigned) {
  uint16_t matrices[4][8][8];
  for (int i = 0; i < 32; ++i) std::memcpy(matrices[i / 8][i % 8], static_cast<const Loaded*>(operands[i])->row, 16);
  for (int lane = 0; lane < 32; ++lane) {
    const int outer = lane / 4, inner = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrices[i];
      const uint32_t low = transposed ? m[inner][outer] : m[outer][inner];
      const uint32_t high = transposed ? m[inner + 1][outer] : m[outer][inner + 1];
      static_cast<const Loaded*>(operands[lane])->registers[i] = low | high << 16;
    }
  }
}

struct Multiplied {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <float (*value)(uint32_t)>
void finish_multiply(void* const* operands, unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Multiplied*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[group + r % 2 * 8][pair + half + r / 2 * 8] = value(own.a[r] >> 16 * half & 0xffff);
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half) b[pair + half + r * 8][group] = value(own.b[r] >> 16 * half & 0xffff);
    for (int r = 0; r < 4; ++r) d[group + r / 2 * 8][pair + r % 2] = own.d[r];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int r = 0; r < 4; ++r)
      static_cast<const Multiplied*>(operands[lane])->d[r] = d[group + r / 2 * 8][pair + r % 2];
  }
}

void finish_multiply_tf32(void* const* operands, unsigned) {
  float a[16][8], b[8][8], d[16][8];
  const auto value = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1FFFu); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Multiplied*>(operands[lane]);
    const int group = lane / 4, place = lane % 4;
    for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][place + r / 2 * 4] = value(own.a[r]);
    for (int r = 0; r < 2; ++r) b[place + r * 4][group] = value(own.b[r]);
    for (int r = 0; r < 4; ++r) d[group + r / 2 * 8][place * 2 + r % 2] = own.d[r];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 8; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      static_cast<const Multiplied*>(operands[lane])->d[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

constexpr Collective kBarrier{"__syncwarp", nullptr, Meeting::kWarpBarrier};
constexpr Collective kShuffles[] = {{"__shfl_sync", finish_shuffle, Meeting::kShuffle},
                                    {"__shfl_up_sync", finish_shuffle, Meeting::kShuffle},
                                    {"__shfl_down_sync", finish_shuffle, Meeting::kShuffle},
                                    {"__shfl_xor_sync", finish_shuffle, Meeting::kShuffle}};
constexpr Collective kVotes[] = {{"__ballot_sync", finish_vote, Meeting::kVote},
                                 {"__any_sync", finish_vote, Meeting::kVote},
                                 {"__all_sync", finish_vote, Meeting::kVote}};
constexpr Collective kLoad{"ldmatrix.x4", finish_load<false>, Meeting::kMatrixLoad};
constexpr Collective kTransposedLoad{"ldmatrix.x4.trans", finish_load<true>, Meeting::kMatrixLoad};
constexpr Collective kMultiplyF16{"mma.m16n8k16.f16", finish_multiply<from_f16>, Meeting::kMatrixProduct};
constexpr Collective kMultiplyBf16{"mma.m16n8k16.bf16", finish_multiply<from_bf16>, Meeting::kMatrixProduct};
constexpr Collective kMultiplyTf32{"mma.m16n8k8.tf32", finish_multiply_tf32, Meeting::kMatrixProduct};

}  // namespace

void warp_barrier(unsigned mask) { warp_wait(kBarrier, mask, nullptr); }

uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t bits, int argument, int width) {
  const Collective& what = kShuffles[static_cast<int>(mode)];
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail(std::string(what.name) + ": the width must be a power of two up to 32, got " + std::to_string(width));
  Shuffled operand{bits, source_of(mode, static_cast<int>(lane()), argument, width), 0};
  warp_wait(what, mask, &operand);
  return operand.result;
}

unsigned vote(Vote kind, unsigned mask, bool predicate) {
  Voted operand{predicate, 0};
  warp_wait(kVotes[static_cast<int>(kind)], mask, &operand);
  return operand.result;
}

void load_matrices(uint32_t (&registers)[4], bool transposed, const void* row) {
  const Collective& what = transposed ? kTransposedLoad : kLoad;
  check_aligned(what.name, row, 16);
  check_shared(what.name, row, 16);
  count_matrix_load(row, __builtin_return_address(0));
  Loaded operand{registers, row};
  warp_wait(what, kAll, &operand);
}

void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiplied operand{d, a, b};
  warp_wait(kMultiplyF16, kAll, &operand);
}

void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiplied operand{d, a, b};
  warp_wait(kMultiplyBf16, kAll, &operand);
}

void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiplied operand{d, a, b};
  warp_wait(kMultiplyTf32, kAll, &operand);
}

}  // namespace ck::simt
