// Heads of 16 channels and more in 16-bit types: 16 positions of a head's convolution are a product with a banded
// matrix that is made from its filters, on tensor cores,
//
//   y[r, c] = sum over u of A[r, u] z[u, c],   A[r, r + j] = filter of row r, tap j,   r < 16, u < 15 + taps.
//
// Numbers enter the products as sums of bfloat16 terms, three for float32, which hold all of its bits; products below
// 2^-26 of the largest are left out. Zeros of A spread what is not finite to neighbours whose windows do not see it:
// then the result is not finite either, and the tile is summed tap by tap instead.
//
// A warp works on a unit, up to 64 channels of a head, and walks along time by itself, 16 rows at a time. What it reads
// comes through rings of tiles in its own part of shared memory. The warps of a block have units side by side.
#pragma once

#include <type_traits>

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/plan.h"
#include "csrc/cuda/conv/staging.cuh"

namespace ck::cuda {

// The unit of a warp, and where it walks: `channels` channels from c0 on; 0 where no unit is left. Rows of shared
// memory have kWidth channels.
template <int kWidth>
struct BandUnit {
  // What a lane copies and stores of a tile: the vector from `column` on of every kRowStep-th row from `row` on. Eight
  // lanes, which have the banks of shared memory together, have a whole row of 64 channels, or eight rows.
  static constexpr int kVectors = kWidth / 8, kRowStep = 32 / kVectors, kTurns = kBandTile / kRowStep;
  static constexpr int kRowDistance = kWidth == 64 ? kVectors : 1;  // from lane to lane that differ in their rows
  static constexpr int kPitch = band_pitch(kWidth), kTileSize = kBandTile * kPitch;

  int lane, warp, units;  // units: of the block
  int column, row;
  int channels, head, piece;
  int first_head, heads;  // of the block
  int group, owner;
  int64_t c0;

  // All in 32 bits, where a division is short.
  CK_DEVICE BandUnit(const Problem& p, const BandShape& shape, int64_t groups)
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        units(blockDim.x / 32),
        column(kWidth == 64 ? lane % kVectors * 8 : lane / kRowStep * 8),
        row(kWidth == 64 ? lane / kVectors : lane % kRowStep) {
    const int all = static_cast<int>(p.heads) * shape.pieces, R = static_cast<int>(p.channels / p.heads);
    const unsigned blocks = (all + units - 1) / units, others = blockIdx.x / blocks;
    const int first = static_cast<int>(blockIdx.x % blocks) * units, unit = min(first + warp, all - 1);
    head = unit / shape.pieces;
    piece = unit % shape.pieces;
    first_head = first / shape.pieces;
    heads = min(first + units - 1, all - 1) / shape.pieces - first_head + 1;
    group = static_cast<int>(others % static_cast<unsigned>(groups));
    owner = static_cast<int>(others / static_cast<unsigned>(groups));
    const int inner = piece * shape.piece(R);
    c0 = int64_t{head} * R + inner;
    channels = first + warp < all ? max(min(R - inner, shape.piece(R)), 0) : 0;
  }
};

// Rows of a phase, in tiles of 16: row n is at position first + n * dilation.
struct TileRows {
  int b;
  int64_t first;
  int dilation;

  CK_DEVICE int64_t position(int64_t n) const { return first + n * dilation; }
};

// The runs of a block: body(rows, count) for each run of `count` tiles of a phase of a batch row, whose row 0 is that
// of `rows`. `before`: so many positions before 0 belong to it; `extra`: so many rows after the last one of a phase.
template <class Unit, class Body>
CK_DEVICE void for_runs(const Problem& p, const Unit& unit, int64_t groups, int64_t before, int64_t extra,
                        const Body& body) {
  // The plan leaves other kernels what has more of them than 32 bits count.
  const unsigned dilation = static_cast<unsigned>(p.taps.dilation);
  const unsigned tiles =
      static_cast<unsigned>(ceil_div(ceil_div(p.time + before, p.taps.dilation) + extra, int64_t{kBandTile}));
  const unsigned all = static_cast<unsigned>(p.owner_batch()) * dilation * tiles;
  const unsigned each = (all + static_cast<unsigned>(groups) - 1) / static_cast<unsigned>(groups);
  const unsigned end = min((unit.group + 1) * each, all);
  for (unsigned at = unit.group * each; at < end;) {
    const unsigned line = at / tiles, first = at % tiles, count = min(tiles - first, end - at);
    const int64_t phase = line % dilation - before;
    body(TileRows{unit.owner + static_cast<int>(line / dilation), phase + int64_t{first} * kBandTile * p.taps.dilation,
                  static_cast<int>(dilation)},
         static_cast<int>(count));
    at += count;
  }
}

// Rows of a run of `count` tiles that exist.
CK_DEVICE int rows_of_run(const Problem& p, const TileRows& rows, int count) {
  return static_cast<int>(min(ceil_div(p.time - rows.first, rows.dilation), int64_t{count} * kBandTile));
}

// Waits for all that read what this warp has copied, or copied what it reads: the warps of a block copy filters of
// their own (kOwn) together, all else each for itself.
template <bool kOwn>
CK_DEVICE void sync_copies() {
  if constexpr (kOwn)
    __syncthreads();
  else
    __syncwarp();
}

// Copies the tiles of a run one after another: of x and the gate, or of d(y). One address is found and moved on.
template <class T, bool kInput, int kTensors, int kWidth>
struct TileCopies {
  using Unit = BandUnit<kWidth>;
  const T* from[kTensors];  // this lane's vector of its first row
  int next;                 // the tile to be copied
  int whole, count;         // from which tile on, and how many, are there with all their rows
  const bool* mask;         // of row lane % 16
  bool open;                // what it says, read a tile ahead

  // From tile `tile` on, of which rows below `wanted` are needed.
  template <class P>
  CK_DEVICE void start(const P& p, const TileRows& rows, int tile, int wanted, const Unit& unit) {
    const int64_t span = int64_t{kBandTile} * rows.dilation, last = span - rows.dilation;
    next = tile;
    whole = static_cast<int>(-floor_div(rows.first, span));
    count = static_cast<int>(min(floor_div(p.time - 1 - last - rows.first, span), int64_t{wanted / kBandTile - 1})) +
            1 - whole;
    if (p.vector_bytes != 16 || count < 0) count = 0;
    const int64_t s = rows.position(int64_t{tile} * kBandTile + unit.row);
    const int64_t c = unit.c0 + (unit.column < unit.channels ? unit.column : 0);
    for (int n = 0; n < kTensors; ++n) {
      const Rows& tensor = source(p, n);
      from[n] = static_cast<const T*>(tensor.data) + rows.b * tensor.batch + s * tensor.time + c;
    }
    if (!kInput || p.mask == nullptr) return;
    mask =
        p.mask + rows.b * p.mask_batch + rows.position(int64_t{tile} * kBandTile + unit.lane % kBandTile) * p.mask_time;
    look_ahead();
  }

  CK_DEVICE bool is_whole() const { return static_cast<unsigned>(next - whole) < static_cast<unsigned>(count); }
  CK_DEVICE void look_ahead() {
    if (is_whole()) open = *mask;
  }

  // Starts the copies of the next tile to `to`, and of the gate `apart` elements after it.
  template <class P>
  CK_DEVICE void copy(T* to, int apart, const P& p, const TileRows& rows, int wanted, const Unit& unit) {
    to += unit.column;
    if (is_whole()) {
      unsigned bits = kAllLanes;
      if (kInput && p.mask != nullptr) bits = __ballot_sync(kAllLanes, open);
      bits = unit.column < unit.channels ? bits >> unit.row : 0;
      T* row = to + unit.row * Unit::kPitch;
      int64_t hop[kTensors];
      for (int n = 0; n < kTensors; ++n) hop[n] = Unit::kRowStep * p.taps.dilation * source(p, n).time;
#pragma unroll
      for (int turn = 0; turn < Unit::kTurns; ++turn) {
        const bool valid = (bits >> turn * Unit::kRowStep & 1) != 0;
        for (int n = 0; n < kTensors; ++n) {
          cp_async<16>(row + n * apart, from[n], valid);
          from[n] += hop[n];
        }
        row += Unit::kRowStep * Unit::kPitch;
      }
    } else {
      const int n0 = next * kBandTile;
      for (int n = 0; n < kTensors; ++n) {
        stage_any_rows<T, kInput, kBandTile, 1>(to + n * apart, Unit::kPitch, p, source(p, n), rows.b,
                                                rows.position(n0), rows.dilation, min(wanted - n0, kBandTile),
                                                unit.c0 + unit.column, unit.channels - unit.column, opaque(unit.row),
                                                Unit::kRowStep);
        from[n] += kBandTile * p.taps.dilation * source(p, n).time;
      }
    }
    ++next;
    if (!kInput || p.mask == nullptr) return;
    mask += int64_t{kBandTile} * rows.dilation * p.mask_time;
    look_ahead();
  }

  template <class P>
  static CK_DEVICE const Rows& source(const P& p, int n) {
    if constexpr (kInput)
      return n == 0 ? p.x : p.gate;
    else
      return p.grad;
  }
};

// Tiles of z, or of d(y), in a ring. What is not a single term arrives in tiles of its own, and is gated and split by
// the lanes that copied it.
template <class T, bool kGate, int kWidth, int kAhead, int kRaw = kAhead>
struct TileRing {
  using Unit = BandUnit<kWidth>;
  static constexpr int kLaneWidth = kWidth;
  static constexpr int kParts = band_parts(std::is_same_v<T, f16>, kGate), kTensors = kGate ? 2 : 1;
  static constexpr bool kDirect = kParts == 1;
  static constexpr int kGroups = kWidth / 16;  // of 16 channels
  static constexpr int kTile = Unit::kTileSize;
  static constexpr int kTurns = kRaw;

  T* base;
  int slots;

  CK_DEVICE TileRing(char* shared, int tiles)
      : base(reinterpret_cast<T*>(shared)), slots(band_slots(kParts, tiles, kAhead)) {}

  static CK_DEVICE int bytes(int tiles) { return band_ring_bytes(kParts, kTensors, tiles, kWidth, kAhead, kRaw); }

  // What follows a raw slot; slot `by` after another one, by < slots.
  static CK_DEVICE int next_raw(int turn) { return turn + 1 < kRaw ? turn + 1 : 0; }
  CK_DEVICE int after(int slot, int by) const { return slot + by < slots ? slot + by : slot + by - slots; }
  CK_DEVICE T* at(int slot) const { return base + slot * (kParts * kTile); }
  // Where tiles arrive: turn by turn.
  CK_DEVICE T* raw(int turn) const { return base + (slots * kParts + turn * kTensors) * kTile; }

  // Makes the parts of a tile that this lane has copied.
  CK_DEVICE void split(int slot, int turn, const Unit& unit, Activation gates) const {
#pragma unroll
    for (int n = 0; n < Unit::kTurns; ++n) {
      const int place = (unit.row + n * Unit::kRowStep) * Unit::kPitch + unit.column;
      float z[8];
      unpack_vector(z, raw(turn) + place);
      if constexpr (kGate) {
        float gate[8];
        unpack_vector(gate, raw(turn) + kTile + place);
        apply_gate<T>(z, gate, gates);
      }
      for (int part = 0; part < kParts; ++part) {
        uint32_t words[4];
        for (int e = 0; e < 4; ++e) {
          words[e] = narrow_pair<bf16>(z[2 * e], z[2 * e + 1]);
          z[2 * e] -= widen(bf16{static_cast<uint16_t>(words[e])});
          z[2 * e + 1] -= widen(bf16{static_cast<uint16_t>(words[e] >> 16)});
        }
        // What is infinite is one term: there is no rest.
        for (int e = 0; part == 0 && e < 8; ++e) z[e] = z[e] == z[e] ? z[e] : 0.0f;
        store_vector(at(slot) + part * kTile + place, words);
      }
    }
  }
};

// What walking a ring of z or d(y) along a run takes: where its tiles are copied to, and which one comes next.
template <bool kInput, class Ring, class T>
struct TileWalk {
  using Unit = typename Ring::Unit;
  TileCopies<T, kInput, Ring::kTensors, Ring::kLaneWidth> copies;
  TileRows rows;
  int wanted;
  int fill, turn;  // the slot, or where parts are made, the turn, that is copied to next

  template <class P>
  CK_DEVICE void start(const P& p, const TileRows& from, int tile, int rows_wanted, const Unit& unit) {
    rows = from;
    wanted = rows_wanted;
    fill = turn = 0;
    copies.start(p, rows, tile, wanted, unit);
  }

  // Starts the copy of the next tile.
  template <class P>
  CK_DEVICE void copy(const P& p, const Ring& ring, const Unit& unit) {
    if constexpr (Ring::kDirect) {
      copies.copy(ring.at(fill), 0, p, rows, wanted, unit);
      fill = ring.after(fill, 1);
    } else {
      copies.copy(ring.raw(turn), Ring::kTile, p, rows, wanted, unit);
      turn = Ring::next_raw(turn);
    }
  }
};

// acc += a b over terms, of those products that are small against the rest, or of the large ones. Small ones are added
// first, so that they lose nothing.
template <bool kSmall, int kParts>
CK_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[3][4], const uint32_t (&b)[kParts][2]) {
  if constexpr (!kSmall) return mma_m16n8k16<bf16>(acc, a[0], b[0]);
  mma_m16n8k16<bf16>(acc, a[2], b[0]);
  if constexpr (kParts == 3) mma_m16n8k16<bf16>(acc, a[0], b[2]);
  if constexpr (kParts > 1) mma_m16n8k16<bf16>(acc, a[1], b[1]);
  mma_m16n8k16<bf16>(acc, a[1], b[0]);
  if constexpr (kParts > 1) mma_m16n8k16<bf16>(acc, a[0], b[1]);
}

// out += A z of `steps` tiles and the unit's channels. load(a, term, s): the matrices of A. tile(s): the rows of z.
template <class Ring, class Load, class Tile>
CK_DEVICE void band_product(float (&out)[2 * Ring::kGroups][4], int steps, int lane, const Load& load,
                            const Tile& tile) {
  const int place = lane % 16 * Ring::Unit::kPitch + lane / 16 * 8;
  const auto pass = [&](auto small) {
    constexpr bool kSmall = decltype(small)::value;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      uint32_t a[3][4];
      for (int term = 0; term < (kSmall ? 3 : 1); ++term)
        if (!kSmall || Ring::kParts > 1 || term > 0) load(a[term], term, s);
      const auto* const rows = tile(s) + place;
#pragma unroll
      for (int g = 0; g < Ring::kGroups; ++g) {
        uint32_t words[Ring::kParts][4], b[Ring::kParts][2];
        for (int part = 0; part < (kSmall ? Ring::kParts : 1); ++part)
          ldmatrix_x4_trans(words[part], rows + part * Ring::kTile + 16 * g);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          for (int part = 0; part < Ring::kParts; ++part)
            b[part][0] = words[part][2 * n], b[part][1] = words[part][2 * n + 1];
          multiply<kSmall, Ring::kParts>(out[2 * g + n], a, b);
        }
      }
    }
  };
  pass(Bool<true>{});
  pass(Bool<false>{});
}

// Where a run's results go, tile by tile.
template <class T, int kWidth>
struct TileStores {
  using Unit = BandUnit<kWidth>;

  T* to;  // this lane's vector of its first row

  CK_DEVICE TileStores(const Rows& tensor, const TileRows& rows, const Unit& unit)
      : to(static_cast<T*>(tensor.data) + rows.b * tensor.batch + rows.position(unit.row) * tensor.time + unit.c0 +
           unit.column) {}

  // Stores the next tile from shared memory, of which `rows` rows exist. By the warp.
  CK_DEVICE void store(const T* tile, const Problem& p, const Rows& tensor, int rows, const Unit& unit) {
    const T* const from = tile + unit.row * Unit::kPitch + unit.column;
    const int channels = unit.channels - unit.column, last = channels > 0 ? rows - unit.row : 0;
    const int64_t hop = Unit::kRowStep * p.taps.dilation * tensor.time;
#pragma unroll
    for (int turn = 0; turn < Unit::kTurns; ++turn, to += hop) {
      uint32_t words[4];
      load_vector(words, from + turn * Unit::kRowStep * Unit::kPitch);
      if (turn * Unit::kRowStep >= last) continue;
      if (p.vector_bytes == 16)
        store_vector(to, words);
      else
        store_pieces(to, words, channels, p.vector_bytes);
    }
  }
  CK_DEVICE void skip(const Problem& p, const Rows& tensor) { to += kBandTile * p.taps.dilation * tensor.time; }
};

// Rounds a unit's results, puts them where a tile is no longer needed, and returns whether all are finite. By the warp.
template <class T, int kMatrices>
CK_DEVICE bool put_tile(T* tile, const float (&out)[kMatrices][4], int lane) {
  constexpr int kPitch = band_pitch(8 * kMatrices);
  uint32_t* const to = reinterpret_cast<uint32_t*>(tile + lane / 4 * kPitch + lane % 4 * 2);
  uint32_t found = 0;
#pragma unroll
  for (int n = 0; n < kMatrices; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = narrow_pair<T>(out[n][2 * half], out[n][2 * half + 1]);
      found = not_finite_pair<T>(pair, found);
      to[4 * n + half * 4 * kPitch] = pair;
    }
  }
  return __any_sync(kAllLanes, !all_finite(found)) == 0;
}

}  // namespace ck::cuda
