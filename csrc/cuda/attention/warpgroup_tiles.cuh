// Tiles of the kernels for warpgroups in shared memory, as tensor_load lays them: panels of 64 channels, whose rows
// have 128 bytes.
#pragma once

#include "csrc/cuda/attention/fragments.cuh"
#include "csrc/cuda/device/warpgroup.cuh"

namespace ck::cuda {

// Where piece `piece` of 8 channels of row r stands. rows: a multiple of 1024 bytes.
CK_DEVICE char* piece_of_row(char* rows, int panel, int r, int piece) {
  return rows + piece / 8 * panel + r * 128 + ((piece ^ r) % 8) * 16;
}

// Rows for multiply_table, from a multiple of 8 rows on: in panels, `panel` bytes apart, or, where `pitch` is not 0, so
// many bytes apart.
struct TileRows {
  char* rows;
  int panel, pitch;

  CK_DEVICE void load_left(uint32_t (&a)[4], int n, int k, int lane) const {
    const int row = n + lane % 16, piece = k / 8 + lane / 16;
    ldmatrix_x4(a, pitch == 0 ? piece_of_row(rows, panel, row, piece) : rows + row * pitch + piece * 16);
  }
};

// The tiles of keys whose keys all queries of a tile see.
struct SeenTiles {
  Range first_keys;

  CK_DEVICE SeenTiles(const Attention& p, const AttentionTile& tile) {
    const Range first = visible_keys(p, tile, tile.first);
    const Range last = visible_keys(p, tile, tile.first + tile.count - 1);
    first_keys = {max(first.first, last.first), min(first.end, last.end) - kWarpgroupKeys + 1};
  }
  CK_DEVICE bool has(int j0, bool real) const { return real && j0 >= first_keys.first && j0 < first_keys.end; }
};

// Puts zeros in place of what is not finite in half of the rows of a tile of values, by a warpgroup. Returns whether
// this thread has found any.
template <class T, int D>
CK_DEVICE bool clear_values(char* values, int panel, int half) {
  constexpr int kPieces = D / 8, kRows = kWarpgroupKeys / 2;
  bool found = false;
#pragma unroll 1
  for (int n = threadIdx.x % 128; n < kRows * kPieces; n += 128) {
    auto* const at = reinterpret_cast<uint4*>(piece_of_row(values, panel, half * kRows + n / kPieces, n % kPieces));
    const uint4 x = *at;
    const uint4 y = make_uint4(finite_pair<T>(x.x), finite_pair<T>(x.y), finite_pair<T>(x.z), finite_pair<T>(x.w));
    if (x.x == y.x && x.y == y.y && x.z == y.z && x.w == y.w) continue;
    *at = y;
    found = true;
  }
  return found;
}

}  // namespace ck::cuda
