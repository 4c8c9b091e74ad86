// What the tests of tiles call in each compilation.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/common/dtypes.h"
#include "csrc/cpu/dispatch.h"

namespace ck::cpu {

struct TileTests {
  // c += the product of two tiles.
  void (*product)(const void* a, const void* b, void* c);
  // kFunctions results of 16 lanes each, of 32 numbers.
  void (*functions)(const float* x, float* out);
  // Of two matrices of 32 rows: a b^T, [2 halves of b][32][16], and a^T b in tiles [channels of a / 16][of b / 16],
  // rows and columns in the order of channel_of.
  void (*products)(const bf16* a, const bf16* b, int64_t channels, float* over_channels, float* over_rows);
  // The band of a filter, [terms][16 rows][32 * steps], from 32 * steps values, zeros behind the last. Whether terms
  // hold all of them.
  bool (*band)(const float* values, int64_t taps, bf16* to);
};
constexpr int64_t kTermsOfBands = 3;
constexpr int kFunctions = 9;

namespace tiles_portable {
extern const TileTests kTests;
}
#if defined(__x86_64__)
namespace tiles_avx2 {
extern const TileTests kTests;
}
namespace tiles_avx512 {
extern const TileTests kTests;
}
namespace tiles_amx {
extern const TileTests kTests;
}
#endif

// Those that this machine runs, the portable one first.
inline std::vector<const TileTests*> tile_tests() {
  std::vector<const TileTests*> list = {&tiles_portable::kTests};
#if defined(__x86_64__)
  if (isa_supported("avx2")) list.push_back(&tiles_avx2::kTests);
  if (isa_supported("avx512")) list.push_back(&tiles_avx512::kTests);
  if (isa_supported("amx")) list.push_back(&tiles_amx::kTests);
#endif
  return list;
}

}  // namespace ck::cpu
