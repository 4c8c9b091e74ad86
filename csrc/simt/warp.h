// What the lanes of a warp do together. Each of these waits for all the lanes that the mask names.
#pragma once

#include <cstdint>

namespace ck::simt {

enum class Shuffle { kIndex, kUp, kDown, kXor };

void warp_barrier(unsigned mask);

// `bits` of the lane that the mode and the argument select, or the caller's own where that is outside its group of
// `width` lanes.
uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t bits, int argument, int width);

enum class Vote { kBallot, kAny, kAll };

// The lanes whose predicate holds.
unsigned vote(Vote kind, unsigned mask, bool predicate);

// ldmatrix of 4 matrices of 8 rows; lane 8 i + j names row j of matrix i.
void load_matrices(uint32_t (&registers)[4], bool transposed, const void* row);

// mma.m16n8k16 with float32 sums in the order of k.
void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// mma.m16n8k8 of TF32, in the same way.
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace ck::simt
