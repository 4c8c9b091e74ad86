// Matrix products of a warpgroup, wgmma.mma_async with sums in float32.
//
// They are done by the wait for their group, each warp's part by itself, and half of the waits end only where no thread
// can go on. Until then the sums are NaN, and the operands must stay as they were. Operands in shared memory are what
// the async proxy sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ck::simt {

// What the lanes of a warp have in common. Descriptors are those of the PTX ISA; `other`: the dimension that is not
// summed lies along rows.
struct Factors {
  uint64_t a, b;
  bool a_in_registers, a_other, b_other;
  bool add;  // to the sums that are there
  bool operator==(const Factors&) const = default;
};

// The sums of a warp that products under way change.
struct Sums {
  float* lanes[32];  // [columns / 8][4] each
  unsigned columns;
  unsigned products;          // under way
  std::vector<float> values;  // [16][columns]
};

struct Product {
  Factors factors;
  unsigned warp, group;
  float* sums;                 // of the first lane
  std::vector<uint16_t> a, b;  // as they were when it began; a: [16][16] if it is in registers
  void (*finish)(const Product& product, Sums& sums);
};

struct WarpProducts {
  bool fenced = false;  // since the last commit or wait
  unsigned group = 0;
  bool late = false;  // the warp waits until no thread can go on, for all groups but the `newest`
  unsigned newest = 0;
  std::vector<Product> products;
  std::vector<Sums> sums;
};

// Ends the wait of a warp that is late. Returns false if none is.
bool advance_products();

// What follows is called by kernels, by whole warps.

// d = a b, or d += a b, a of 64 x 16 and b of 16 x `columns`, which is 64 or 128. registers: a, if it is there.
void multiply_warpgroup(unsigned columns, bool bf16, float* d, const uint32_t* registers, const Factors& factors);
void products_fence();
void products_commit();
void products_wait(unsigned newest);
// Called when a thread ends.
void end_products();

}  // namespace ck::simt
