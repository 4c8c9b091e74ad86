// What an attention kernel is asked to do: plain pointers, sizes and strides (in elements), no torch.
#pragma once

#include <cstdint>

#include "csrc/common/dtypes.h"
#include "csrc/common/taps.h"

namespace ck {

// A [batch, time, head, channel] tensor with any strides.
struct HeadRows {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0, channel = 0;
};

// A [head, row, column] table with any strides; those of missing dimensions are 0. data == nullptr: the term is not
// there.
struct HeadTable {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  bool per_head = true;  // false: the heads share one table
  int64_t head = 0, row = 0, column = 0;
};

enum class Outside : int8_t { kClip, kZero, kMask };

// One call of attention or attention_grad. Equation: docs/semantics.md.
struct Attention {
  int64_t batch = 0, queries = 0, keys = 0, heads = 0, groups = 0;
  int64_t channels = 0, rank = 0;  // of q, and of rel_query
  int64_t left = 0, right = 0;
  Outside outside = Outside::kClip;
  bool causal = false, qk = true;
  double scale = 1.0, rel_scale = 1.0, dropout = 0.0;
  Dtype dtype = Dtype::kFloat32;

  HeadRows q, k, v, rel_query;  // rel_query.data == nullptr: q takes its place
  HeadTable bias, query_rel, key_rel, value_conv, value_conv_bias, value_conv_scale;
  const bool* key_mask = nullptr;  // false: the key and its value are not there
  int64_t mask_batch = 0, mask_key = 0;
  int64_t sequences = 1;  // packed in the one batch row

  CK_HD int64_t window() const { return left + right + 1; }
  CK_HD int64_t sharing() const { return heads / groups; }
  CK_HD bool clips() const { return outside == Outside::kClip; }
  CK_HD bool has_query_columns() const { return bias.data != nullptr || query_rel.data != nullptr; }
  CK_HD bool has_columns() const { return has_query_columns() || key_rel.data != nullptr; }
};

// A [batch, head, time] tensor in the compute type.
struct HeadScalars {
  void* data = nullptr;
  int64_t batch = 0, head = 0, time = 0;
};

// Where the gradients go; data == nullptr: not wanted. Those of tables are contiguous, in the table's own type.
struct AttentionGradients {
  HeadRows grad, out;         // d(loss)/d(out) and the result itself, inputs
  HeadScalars grad_lse, lse;  // inputs; grad_lse.data == nullptr: lse was not used
  HeadRows grad_q, grad_k, grad_v, grad_rel_query;
  void *grad_bias = nullptr, *grad_query_rel = nullptr, *grad_key_rel = nullptr, *grad_value_conv = nullptr,
       *grad_value_conv_bias = nullptr, *grad_value_conv_scale = nullptr;
};

}  // namespace ck
