// A tile of the backward passes, and what one of its warps finds once for all that it meets.
#pragma once

#include "csrc/cuda/attention/relative.cuh"

namespace ck::cuda {

// In shared memory, where it takes no registers: a warp has its own, which one lane writes.
template <Side kOwn>
struct alignas(16) WarpTile {
  int number;
  AttentionTile tile;
  unsigned b, h, g;  // where it belongs to; h: of queries
  int part, own;     // own: the first of the warp's 16 positions
  Range others;      // those that see, or are seen by, some position of the tile
  FarTiles<kOwn, kGradOthers, 16> far;
  unsigned real = ~0u;  // of 16 keys, which the mask leaves
  bool finite = false;  // what is not finite in the others' rows is left out

  // blocks: that share the tiles of a head, or group. row: the warp's first one.
  CK_DEVICE WarpTile(const Attention& p, int number, unsigned blocks, int row)
      : number(number),
        tile(p, number, kGradRows, kOwn == Side::kKeys, kOwn == Side::kKeys),
        part(static_cast<int>(blockIdx.x % blocks)),
        own(tile.first + row),
        others(kOwn == Side::kQueries ? visible_keys(p, tile, tile.first, tile.end())
                                      : seeing_queries(p, tile, max(tile.first, tile.key_begin), tile.end())),
        far(p, tile, own) {
    const unsigned unit = blockIdx.x / blocks, heads = static_cast<unsigned>(p.heads),
                   groups = static_cast<unsigned>(p.groups), units = kOwn == Side::kQueries ? heads : groups;
    b = unit / units;
    h = unit % units;
    g = kOwn == Side::kQueries ? h / (heads / groups) : h;
  }

  // Where some position does not attend to all others that it could.
  CK_DEVICE void leave_far() { far.left = far.right = {0, 0}; }
};
static_assert(sizeof(WarpTile<Side::kQueries>) == kWarpTileBytes && sizeof(WarpTile<Side::kKeys>) == kWarpTileBytes);

}  // namespace ck::cuda
