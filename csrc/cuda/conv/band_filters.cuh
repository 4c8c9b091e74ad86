// The banded matrices of the band kernels: from logits to the terms of a tile's filters in shared memory.
#pragma once

#include "csrc/cuda/conv/band.cuh"

namespace ck::cuda {

// A of a tile, 16 rows by 16 columns per step, as terms of bfloat16. Row r has tap j in column r + j + shift, and zeros
// elsewhere, where nothing is ever written.
struct BandMatrix {
  uint32_t* words;
  int steps, pitch, shift;

  CK_DEVICE BandMatrix(char* shared, const BandShape& shape, int shift)
      : words(reinterpret_cast<uint32_t*>(shared)),
        steps(shape.steps),
        pitch(band_matrix_pitch(shape.steps)),
        shift(shift) {}

  CK_DEVICE BandMatrix other(int number) const {
    BandMatrix matrix = *this;
    matrix.words += number * kBandTile * pitch;
    return matrix;
  }

  // By a warp.
  CK_DEVICE void clear(int lane) const {
    for (int i = lane; i < kBandTile * pitch; i += 32) words[i] = 0;
  }

  // Columns 16 * s ... of a term, as the first matrix of a product; or these columns as rows.
  CK_DEVICE void load(uint32_t (&a)[4], int term, int s, int lane) const {
    ldmatrix_x4(a, words + lane % 16 * pitch + 8 * (term * steps + s) + lane / 16 * 4);
  }
  CK_DEVICE void load_transposed(uint32_t (&a)[4], int term, int s, int lane) const {
    ldmatrix_x4_trans(a, words + (lane % 8 + lane / 16 * 8) * pitch + 8 * (term * steps + s) + lane / 8 % 2 * 4);
  }

  // Where the first term of a tap is.
  CK_DEVICE bf16* at(int row, int tap) const {
    return reinterpret_cast<bf16*>(words + row * pitch) + row + tap + shift;
  }
  CK_DEVICE void put(int row, int tap, float value) const {
    bf16* const to = at(row, tap);
    for (int term = 0; term < 3; ++term) {
      to[16 * term * steps] = {static_cast<uint16_t>(narrow_pair<bf16>(value, 0))};
      value -= widen(to[16 * term * steps]);
    }
  }
};

// The taps of a row that a lane of two has, every second one, at most.
constexpr int kLaneTaps = (kBandShort + 1) / 2;

// Calls use(i, j) for the taps j of a lane, numbered by i < kLaneTaps.
template <class Use>
CK_DEVICE void for_lane_taps(int taps, int lane, const Use& use) {
  const int count = (taps + 1) / 2;
#pragma unroll
  for (int i = 0; i < kLaneTaps; ++i) {
    if (i >= count) break;
    use(i, 2 * i + lane % 2);
  }
}

// Makes the filters of 16 rows, row lane / 2 by two lanes, which have its logits in `values`. Taps before `first` and
// from `last` on read other sequences. keep(j, p): after softmax, before dropout. By the warp.
template <class Keep>
CK_DEVICE void make_filters(const Problem& p, const BandMatrix& matrix, const FilterAt& at, int first, int last,
                            int lane, float (&values)[kLaneTaps], const Keep& keep) {
  const int K = static_cast<int>(p.taps.taps), row = lane / 2;
  float inverse = 1;
  if (p.softmax) {
    float highest = -infinity<float>(), total = 0;
    // What is not a number is left out here, and makes the sum one.
    for_lane_taps(K, lane, [&](int i, int) { highest = fmaxf(highest, values[i]); });
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
    for_lane_taps(K, lane, [&](int i, int) {
      values[i] = fast_exp2((values[i] - highest) * 1.4426950408889634f);  // log2(e)
      total += values[i];
    });
    inverse = fast_reciprocal(total + __shfl_xor_sync(kAllLanes, total, 1));
  }
  // Which taps are kept is drawn beforehand, to where they go: of many draws at once there would be much code.
  if (p.seed != nullptr)
#pragma unroll 1
    for (int j = lane % 2; j < K; j += 2)
      *matrix.at(row, j) = {static_cast<uint16_t>(dropout_factor<float>(p, at, j) != 0)};
  for_lane_taps(K, lane, [&](int i, int j) {
    if (j >= K) return;
    float value = values[i] * inverse;
    keep(j, value);
    if (p.seed != nullptr) value *= matrix.at(row, j)->bits != 0 ? static_cast<float>(p.keep_scale) : 0;
    // Times zero, and not zero: where a filter is not finite, the result is not either.
    matrix.put(row, j, j < first || j >= last ? value * 0.0f : value);
  });
}

// Filters that positions share: each tap is put into all rows. Once per block, so in little code.
template <class Unit>
CK_DEVICE void make_shared_filters(const Problem& p, const BandMatrix& matrix, const Unit& unit) {
  for_shared_taps<float>(p, FilterAt(p, unit.owner, 0, unit.head), [&](int64_t j, float value) {
#pragma unroll 1
    for (int row = 0; row < kBandTile; ++row) matrix.put(row, static_cast<int>(j), value);
  });
}

// Logits in memory, or their gradients; strides in elements.
struct LogitMemory {
  char* data;
  int64_t batch, time, head, tap;

  static CK_DEVICE LogitMemory of_weight(const Problem& p) {
    return {static_cast<char*>(const_cast<void*>(p.weight)), p.weight_batch, p.weight_time, p.weight_head,
            p.weight_tap};
  }
  // They are contiguous.
  static CK_DEVICE LogitMemory of_gradient(const Backward& p) {
    const int64_t row = p.heads * p.taps.taps;
    return {static_cast<char*>(p.grad_weight), p.time * row, row, p.taps.taps, 1};
  }
};

// Bytes of a logit: there are no matrices of wider ones.
CK_DEVICE int logit_bytes(const Problem& p) { return p.weight_dtype == Dtype::kFloat32 ? 4 : 2; }

// Tiles of 16 rows of logits, or of their gradients, of a block's heads, which its warps copy together, one tile after
// another. In shared memory a row has the taps of all heads side by side.
struct LogitTiles {
  char* shared;
  int pitch;          // bytes from row to row in shared memory
  int bytes, pieces;  // how many are copied at a time, 0: single numbers; how many pieces a row has
  int row, column;    // of a thread's first piece
  char* next;         // that row in the next tile, and its position
  int64_t t;

  template <class Unit>
  CK_DEVICE LogitTiles(const Problem& p, const BandShape& shape, const Unit& unit, const LogitMemory& memory,
                       char* shared)
      : shared(shared) {
    const int size = logit_bytes(p), taps = static_cast<int>(p.taps.taps), logits = taps * unit.heads;
    pitch = band_logit_pitch(taps, band_heads(shape.pieces, unit.units), size);
    const bool dense = (memory.tap == 1 || taps == 1) && (memory.head == taps || unit.heads == 1);
    const uint64_t bits =
        reinterpret_cast<uintptr_t>(memory.data) |
        static_cast<uint64_t>((memory.batch | memory.time | logits | unit.first_head * memory.head) * size);
    bytes = !dense || bits % 4 != 0 ? 0 : bits % 8 != 0 ? 4 : 8;
    pieces = bytes == 0 ? logits : logits * size / bytes;
    const int columns = min(pieces, static_cast<int>(blockDim.x));
    column = static_cast<int>(threadIdx.x) % columns;
    row = static_cast<int>(threadIdx.x) / columns;
    if (row >= row_step()) row = kBandTile;
  }

  // Rows that threads have at a time.
  CK_DEVICE int row_step() const { return max(static_cast<int>(blockDim.x) / pieces, 1); }
  CK_DEVICE char* at(int slot, int row) const { return shared + (slot * kBandTile + row) * pitch; }

  template <class Unit>
  CK_DEVICE void start(const Problem& p, const LogitMemory& memory, const TileRows& rows, const Unit& unit) {
    t = rows.position(row);
    next = memory.data + (rows.b * memory.batch + t * memory.time + unit.first_head * memory.head) * logit_bytes(p);
  }

  // Calls use(shared, memory, exists) for the pieces of the next tile that this thread has, which lies in a slot.
  template <class Use>
  CK_DEVICE void for_each(const Problem& p, const LogitMemory& memory, int slot, const Use& use) {
    const int size = logit_bytes(p), step = row_step();
    const int64_t dilation = p.taps.dilation, hop = dilation * memory.time * size;
#pragma unroll 1
    for (int c = column; c < pieces; c += static_cast<int>(blockDim.x)) {
      int64_t inner = int64_t{c} * bytes, position = t;
      if (bytes == 0) {
        const int taps = static_cast<int>(p.taps.taps);
        inner = (c / taps * memory.head + c % taps * memory.tap) * size;
      }
      char *from = next + inner, *to = at(slot, row) + c * (bytes == 0 ? size : bytes);
#pragma unroll 1
      for (int r = row; r < kBandTile; r += step) {
        use(to, from, static_cast<uint64_t>(position) < static_cast<uint64_t>(p.time));
        position += step * dilation;
        from += step * hop;
        to += step * pitch;
      }
    }
    t += kBandTile * dilation;
    next += kBandTile * hop;
  }

  // Starts the copy of the next tile to a slot.
  CK_DEVICE void copy(const Problem& p, int slot) {
    const LogitMemory memory = LogitMemory::of_weight(p);
    if (bytes == 8)
      for_each(p, memory, slot,
               [&](char* to, const char* from, bool exists) { cp_async<8>(to, exists ? from : memory.data, exists); });
    else if (bytes == 4)
      for_each(p, memory, slot,
               [&](char* to, const char* from, bool exists) { cp_async<4>(to, exists ? from : memory.data, exists); });
    else
      for_each(p, memory, slot, [&](char* to, const char* from, bool exists) {
        if (exists) move(to, from, logit_bytes(p));
      });
  }

  // Stores the next tile from a slot.
  CK_DEVICE void store(const Backward& p, int slot) {
    for_each(p, LogitMemory::of_gradient(p), slot, [&](const char* from, char* to, bool exists) {
      if (exists) move(to, from, bytes == 0 ? logit_bytes(p) : bytes);
    });
  }

 private:
  static CK_DEVICE void move(char* to, const char* from, int size) {
    if (size == 8)
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
    else if (size == 4)
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
    else
      *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  }
};

// The filters of a tile, made from logits that have arrived.
template <class T, class Unit, class Keep>
CK_DEVICE void make_own_filters(const Problem& p, const BandMatrix& matrix, const Unit& unit, const LogitTiles& logits,
                                int slot, const TileRows& rows, int tile, const Keep& keep) {
  const int64_t t = rows.position(int64_t{tile} * kBandTile + unit.lane / 2);
  const bool exists = t >= 0 && t < p.time;
  int first = 0, last = exists ? static_cast<int>(p.taps.taps) : 0;
  if (exists && p.offsets != nullptr) {
    const Sequence sequence = sequence_of(p, t);
    first = static_cast<int>(p.taps.first_inside(t, sequence.begin));
    last = static_cast<int>(p.taps.last_inside(t, sequence.end));
  }
  const FilterAt at(p, rows.b, exists ? t : 0, unit.head);
  const char* const row =
      logits.at(slot, unit.lane / 2) + (unit.head - unit.first_head) * static_cast<int>(p.taps.taps) * logit_bytes(p);
  // What is outside the tensor was not copied.
  float values[kLaneTaps];
  const auto load = [&](const auto& logit) {
    const int K = static_cast<int>(p.taps.taps);
    for_lane_taps(K, unit.lane, [&](int i, int j) {
      values[i] = j >= K ? -infinity<float>() : exists ? logit(j) : 0.0f;
    });
  };
  if (p.weight_dtype == (std::is_same_v<T, bf16> ? Dtype::kBFloat16 : Dtype::kFloat16))
    load([&](int j) { return widen(reinterpret_cast<const T*>(row)[j]); });
  else if (p.weight_dtype == Dtype::kFloat32)
    load([&](int j) { return reinterpret_cast<const float*>(row)[j]; });
  else
    load([&](int j) { return load_as<float>(row, j, std::is_same_v<T, bf16> ? Dtype::kFloat16 : Dtype::kBFloat16); });
  make_filters(p, matrix, at, first, last, unit.lane, values, keep);
}

}  // namespace ck::cuda
