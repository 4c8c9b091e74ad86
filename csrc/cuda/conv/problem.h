// What a CUDA kernel is asked to do. Pointers are to device memory; the structures are kernel arguments.
#pragma once

#include "csrc/common/conv.h"
#include "csrc/common/philox.h"
#include "csrc/cuda/device/device.h"

namespace ck::cuda {

struct Problem : ck::Convolution {
  const void* offsets = nullptr;  // sequences+1 packed offsets, nullptr: every batch row is one sequence
  bool wide_offsets = false;      // they are int64, otherwise int32
  const int64_t* seed = nullptr;
  uint64_t drop_below = 0;  // dropout drops an element whose random word is below this,
  double keep_scale = 1.0;  // and multiplies the others by this
  bool per_batch = false;   // each batch row has filters of its own (for all its positions, unless per_position)
  int vector_bytes = 16;    // bytes at a time to read and write rows of tensors like x, and of the state

  // Whether the filters of two positions can differ.
  CK_HD bool per_row() const { return per_position || renormalize; }
  CK_HD int64_t head_channels() const { return channels / heads; }
  // An owner is a set of filters that positions share, with the batch rows that it serves: all of them, or one.
  CK_HD int64_t owners() const { return per_batch && !per_position ? batch : 1; }
  CK_HD int64_t owner_batch() const { return owners() == 1 ? batch : 1; }
  // Filters that differ between positions.
  CK_HD int64_t filters() const { return batch * time * heads; }
};

struct Forward : Problem {
  Rows y;
  Finish finish;

  // Whether more is asked for than sums of what is gated by a sigmoid: of kernels of their own, so that others do not
  // ask.
  bool finishes() const { return finish.any() || (gate.data != nullptr && gate_activation != Activation::kSigmoid); }
  // What gates go through in either kind of kernels.
  template <bool kFinish>
  CK_HD Activation gates() const {
    return kFinish ? gate_activation : Activation::kSigmoid;
  }
};

struct Backward : Problem, Gradients {
  // Partial sums over positions, one per group of an owner's positions, which are then added in a fixed order: [owner,
  // group, column, taps] and [owner, group, channels] of the accumulation type. Filters per position whose heads are
  // cut into pieces have one per piece: [piece, batch, time, heads, taps].
  void* partial_weight = nullptr;
  void* partial_bias = nullptr;
  int64_t groups = 1;  // of an owner's positions
  // Of filters that differ between positions: maximum and inverse sum of each, [batch, time, heads, 2].
  void* statistics = nullptr;
};

struct Step : Problem {
  Rows y;
  Finish finish;
  States states;
};

}  // namespace ck::cuda
