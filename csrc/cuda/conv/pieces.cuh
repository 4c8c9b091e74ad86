// What a block of a step has, if that is more than the newest position of some batch rows: pieces of sequences.
#pragma once

#include "csrc/cuda/conv/step.cuh"

namespace ck::cuda {

// A piece of a sequence: positions [from, to) of its `length`.
struct ServedPiece {
  int64_t sequence, b, begin, length;  // position 0 is `begin` of batch row b of x
  int64_t from, to;
  int64_t slot;  // negative: none
  int64_t on;    // row r of the state becomes row r - on

  // Whether it has the sequence's state.
  CK_DEVICE bool first() const { return from == 0 && slot >= 0; }
};

// The items of a block's pieces are numbered through; this finds the piece that has one, for items in ascending order.
struct ServedItems {
  int i = 0;
  int64_t base = 0;  // the first item of piece i
};

template <class T>
struct PiecesBlock : StepBlock<T> {
  using Base = StepBlock<T>;
  using Base::first;
  using Base::p;
  using Base::rows;
  using Base::tiles;

  const int states;  // rows of a state
  const bool whole, cut;
  const int uncut;  // items of each piece, if sequences are not cut

  CK_DEVICE PiecesBlock(const Step& p, const StepTiles& tiles)
      : Base(p, tiles),
        states(static_cast<int>(p.states.width)),
        whole(tiles.whole(p.states.width)),
        cut(tiles.piece_bytes > 0),
        uncut(cut ? 0 : static_cast<int>(tiles.items(p, p.time))) {}

  CK_DEVICE StepPiece* pieces() const { return reinterpret_cast<StepPiece*>(shared_memory() + tiles.filter_bytes); }

  // The pieces of packed sequence n begin with this number. There may be one more than it needs, and so there is room
  // for each without a count of those before.
  CK_DEVICE int64_t first_piece(int64_t n) const {
    return n + min(max(sequence_offset(p, n), int64_t{0}), p.time) / tiles.time;
  }

  // By the block: which pieces it has.
  CK_DEVICE void find_pieces() const {
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
      const int64_t number = first + i;
      int64_t sequence = number / tiles.pieces, piece = number % tiles.pieces;
      if (p.offsets != nullptr) {
        int64_t above = p.states.sequences;
        sequence = 0;
        while (above - sequence > 1) {
          const int64_t middle = (sequence + above) / 2;
          if (first_piece(middle) <= number)
            sequence = middle;
          else
            above = middle;
        }
        piece = number - first_piece(sequence);
      }
      // Offsets that do not begin with 0 leave pieces that nobody has.
      pieces()[i] = {sequence, piece < 0 ? p.time + 1 : piece * tiles.time, 0};
      const ServedPiece own = at(i);
      pieces()[i].items = static_cast<int>(tiles.items(p, own.to - own.from));
    }
    __syncthreads();
  }

  CK_DEVICE ServedPiece at(int i) const {
    const States& s = p.states;
    ServedPiece own{first + i, first + i, 0, p.time, 0, 0, 0, 0};
    if (cut) own.sequence = own.b = pieces()[i].sequence, own.from = pieces()[i].from;
    if (p.offsets != nullptr) {
      const Sequence packed = numbered_sequence(p, own.sequence);
      own.b = 0, own.begin = packed.begin, own.length = max(packed.end - packed.begin, int64_t{0});
    }
    own.to = min(own.from + tiles.time, own.length);
    own.slot = s.slot.get(own.sequence, own.sequence);
    if (own.slot >= s.slots) own.slot = -1;
    // It is not validated on the host; it is clamped.
    own.on = min(max(s.accepted.get(own.sequence, own.length), own.length - (s.width - p.taps.span())), own.length);
    return own;
  }

  CK_DEVICE int items(int i) const { return cut ? pieces()[i].items : uncut; }
  CK_DEVICE int all_items() const {
    if (!cut) return rows * uncut;
    int total = 0;
    for (int i = 0; i < rows; ++i) total += items(i);
    return total;
  }

  CK_DEVICE int within(ServedItems& found, int item) const {
    while (item - found.base >= items(found.i)) found.base += items(found.i++);
    return static_cast<int>(item - found.base);
  }

  CK_DEVICE StepPosition position(const ServedPiece& own, int64_t t) const {
    return {own.b, own.begin + t, t, {own.sequence, 0, own.length, Base::first_row(own.sequence)}};
  }

  CK_DEVICE StepPosition position_of(int item) const {
    ServedItems found;
    if (!cut) found.i = item / max(uncut, 1), found.base = int64_t{found.i} * uncut;
    const int u = within(found, item);
    const ServedPiece own = at(found.i);
    return position(own, own.from + u);
  }
};

}  // namespace ck::cuda
