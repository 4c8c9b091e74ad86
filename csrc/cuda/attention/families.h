// Host entry points of the kernels of attention. Each returns nullptr, or the reason why it could not run.
#pragma once

#include "csrc/cuda/attention/plan.h"
#include "csrc/cuda/attention/problem.h"

namespace ck::cuda {

// One template per family, instantiated per type in instantiate/.
template <class T>
struct PlainAttention {
  static const char* forward(const AttentionForward& p, Stream stream);
  static const char* queries(const AttentionBackward& p, Stream stream);
  static const char* keys(const AttentionBackward& p, Stream stream);
  static const char* taps(const AttentionBackward& p, Stream stream);
};

// bfloat16, float16 and float32.
template <class T>
struct TensorAttention {
  // Makes the tables, before any of the kernels on tensor cores.
  static const char* prepare(const Attention& p, const TensorTables& t, Stream stream);
  static const char* forward(const AttentionForward& p, const TensorTables& t, const AttentionPlan& plan,
                             Stream stream);
  // The passes over the queries and over the keys.
  static const char* queries(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan,
                             Stream stream);
  static const char* keys(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan, Stream stream);
};

// bfloat16 and float16, on GPUs of compute capability 9.0.
template <class T>
struct WarpgroupAttention {
  static const char* forward(const AttentionForward& p, const TensorTables& t, const AttentionPlan& plan,
                             Stream stream);
  static const char* queries(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan,
                             Stream stream);
  static const char* keys(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan, Stream stream);
};

// The sums that end every backward pass; C is the accumulation type.
template <class C>
struct ReduceAttention {
  static const char* tables(const AttentionBackward& p, Stream stream);
};

// What the choice of kernels depends on.
AttentionFacts facts_of(const Attention& p);

// The kernels of a pass, and the bytes that they need besides their arguments.
struct AttentionLaunch {
  AttentionPlan plan;
  int64_t workspace_bytes;
};
AttentionLaunch prepare(const AttentionForward& p);
AttentionLaunch prepare(const AttentionBackward& p);
const char* attention_forward(const AttentionForward& p, const AttentionLaunch& launch, void* workspace, Stream stream);
const char* attention_backward(AttentionBackward p, const AttentionLaunch& launch, void* workspace, Stream stream);

}  // namespace ck::cuda
