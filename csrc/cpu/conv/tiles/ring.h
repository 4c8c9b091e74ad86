// Rows of a window as operands of tiles, in chunks of 16, of every unit of channels. Chunks that the next block reads
// again stay where they are.
#pragma once

#include "csrc/cpu/conv/blocks.h"

namespace ck::cpu::CK_ISA {

constexpr int64_t kChunkRows = 16, kChunkSize = kChunkRows * 32;  // rows of a unit, and their numbers

class Ring {
 public:
  // most: chunks of outputs of a block. halo: chunks that their window has more. pairs: chunks are read with the next.
  Ring(int64_t units, int64_t most, int64_t halo, bool pairs)
      : slots_(most + halo),
        halo_(halo),
        pairs_(pairs),
        memory_(slots_ + (pairs ? 1 : 0)),
        chunks_(units * memory_ * kChunkSize) {}

  // A window for n chunks of outputs. continues: after those of the call before.
  void move(int64_t n, bool continues) {
    const int64_t first = continues ? slot_[outputs_] : 0;
    missing_ = continues ? halo_ : 0;
    outputs_ = n;
    for (int64_t chunk = 0; chunk < slots_; ++chunk) slot_[chunk] = (first + chunk) % slots_;
  }

  // Chunks of the window that are not there yet: [missing, count).
  int64_t missing() const { return missing_; }
  int64_t count() const { return outputs_ + halo_; }
  int64_t outputs() const { return outputs_; }

  // A chunk, and with pairs behind it in memory the next one of the window.
  bf16* chunk(int64_t unit, int64_t chunk) const { return at(unit, slot_[chunk]); }

  // Writes a chunk by write(to).
  template <class Write>
  CK_INLINE void fill(int64_t unit, int64_t chunk, const Write& write) const {
    bf16* const to = at(unit, slot_[chunk]);
    write(to);
    if (pairs_ && slot_[chunk] == 0) memcpy(static_cast<void*>(at(unit, slots_)), to, kChunkSize * sizeof(bf16));
  }

 private:
  static constexpr int64_t kMostSlots = 5;
  bf16* at(int64_t unit, int64_t slot) const { return chunks_.get() + (unit * memory_ + slot) * kChunkSize; }

  const int64_t slots_, halo_;
  const bool pairs_;
  const int64_t memory_;  // slots, and with pairs the first one again behind the last
  int64_t slot_[kMostSlots], outputs_ = 0, missing_ = 0;
  Scratch<bf16> chunks_;
};

}  // namespace ck::cpu::CK_ISA
