// What a CUDA kernel of attention is asked to do. Pointers are to device memory; the structures are kernel arguments.
#pragma once

#include "csrc/common/attention.h"
#include "csrc/common/philox.h"
#include "csrc/cuda/device/device.h"

namespace ck::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Attention : ck::Attention {
  // sequences+1 packed offsets of each, nullptr: every batch row is one sequence.
  const void *query_offsets = nullptr, *key_offsets = nullptr;
  bool wide_query_offsets = false, wide_key_offsets = false;  // they are int64, otherwise int32
  const int64_t* seed = nullptr;
  uint64_t drop_below = 0;  // dropout drops an element whose random word is below this,
  double keep_scale = 1.0;  // and multiplies the others by this
};

// The tables as the tensor kernels read them, made by a kernel of their own: as sums of one or two numbers of q's type,
// [heads or 1][terms][window][pitch], key_rel with its columns reversed; the others in float32.
struct TensorTables {
  void *query_rel = nullptr, *key_rel = nullptr;
  int64_t query_terms = 1, key_terms = 1;
  int64_t rank_pitch = 0, channel_pitch = 0;  // zeros fill it up
  float* bias = nullptr;                      // [heads][window], times log2(e)
  float* taps = nullptr;                      // [heads][window][channel_pitch], times value_conv_scale
  float* key_edges = nullptr;                 // [batch][heads][2][keys]: what key_rel adds left and right of the window
  float* query_edges = nullptr;               // [batch][heads][2][queries]: what the terms of queries add there
  int64_t strip_pitch = 0;                    // of what relative terms add to 16 queries, in shared memory
  int64_t grad_pitch = 0;                     // of the gradients of these
  float score_factor = 1, rel_factor = 1;     // p.scale and p.rel_scale, times log2(e)
  bool whole_strips = false;                  // which then have all columns
  bool vectors = false, rank_vectors = false;  // tensors like q, and rel_query, can be read 16 bytes at a time
};

struct AttentionForward : Attention {
  HeadRows out;
  HeadScalars lse;
};

struct AttentionBackward : Attention, AttentionGradients {
  // sum of p dP over each row, less grad_lse; [batch, heads, queries] of the accumulation type.
  void* delta = nullptr;
  // Gradients of tables are sums over batch rows and positions, which blocks make piece by piece in these and which are
  // then added in a fixed order: [batch, heads, parts, window, rank or channels], bias without the last, taps with one
  // column more, for the bias of the depthwise term.
  void *partial_bias = nullptr, *partial_query_rel = nullptr, *partial_key_rel = nullptr, *partial_taps = nullptr;
  int64_t query_parts = 1, key_parts = 1, tap_parts = 1;

  // What follows from the gradient of the scores, on the side of the queries, and of the keys.
  CK_HD bool needs_queries() const {
    return grad_q.data != nullptr || grad_rel_query.data != nullptr || grad_bias != nullptr ||
           grad_query_rel != nullptr;
  }
  CK_HD bool needs_keys() const { return grad_k.data != nullptr || grad_key_rel != nullptr; }
  CK_HD bool needs_taps() const {
    return grad_value_conv != nullptr || grad_value_conv_bias != nullptr || grad_value_conv_scale != nullptr;
  }
};

}  // namespace ck::cuda
