// From an attention to the launches that compute it. No device code.
#include "csrc/cuda/attention/families.h"

#include <initializer_list>
#include <type_traits>

#include "csrc/common/switch.h"
#include "csrc/cuda/device/workspace.h"

namespace ck::cuda {

namespace {

// Kernels for warpgroups are for 16-bit types alone: no plan asks for others.
template <class T>
using WarpgroupsOf = std::conditional_t<sizeof(T) == 2, WarpgroupAttention<T>, TensorAttention<T>>;

// Whether a tensor can be read 16 bytes at a time along its channels.
bool whole_vectors(const HeadRows& rows, int64_t channels, Dtype dtype) {
  const auto whole = [&](int64_t elements) { return elements * size_of(dtype) % kVectorBytes == 0; };
  return rows.data == nullptr || (rows.channel == 1 && whole(channels) && whole(rows.batch) && whole(rows.time) &&
                                  whole(rows.head) && reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0);
}

// Whether tensor_load can read boxes of a tensor. Strides of dimensions of size 1 do not count.
bool whole_boxes(const HeadRows& rows, int64_t positions, int64_t heads, int64_t batch) {
  const auto whole = [](int64_t size, int64_t stride) {
    return size == 1 || (size > 1 && stride > 0 && stride * 2 % kVectorBytes == 0 && stride < int64_t{1} << 39);
  };
  return rows.channel == 1 && whole(positions, rows.time) && whole(heads, rows.head) && whole(batch, rows.batch) &&
         reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0;
}

// Positions are counted in 32 bits.
const char* check_size(const Attention& p) {
  constexpr int64_t kMost = int64_t{1} << 28;
  return p.queries < kMost && p.keys < kMost && p.left < kMost && p.right < kMost
             ? nullptr
             : "attention: expected fewer than 2^28 queries, keys and columns";
}

// Enters where the tensor kernels' tables go, and how they are cut. Returns the bytes they take.
int64_t assign(TensorTables& t, const Attention& p, const AttentionPlan& plan, bool backward, Workspace workspace) {
  if (plan.family == AttentionFamily::kPlain) return workspace.bytes();
  const int64_t W = p.window();
  t.channel_pitch = plan.channels;
  t.rank_pitch = p.rel_query.data != nullptr ? round_to(p.rank, 16) : plan.channels;
  t.strip_pitch = plan.strip_pitch;
  t.grad_pitch = plan.grad_pitch;
  t.score_factor = static_cast<float>(p.scale) * kLog2e;
  t.rel_factor = static_cast<float>(p.rel_scale) * kLog2e;
  t.whole_strips = W <= kWholeStrip;
  const auto terms = [&](const HeadTable& table) {
    return table.dtype == p.dtype || p.dtype == Dtype::kFloat32 ? 1 : 2;
  };
  t.query_terms = terms(p.query_rel);
  t.key_terms = terms(p.key_rel);
  const auto heads = [&](const HeadTable& table) { return table.per_head ? p.heads : 1; };
  // The workspace is counted in float32.
  const auto floats = [&](int64_t numbers) { return numbers * size_of(p.dtype) / 4; };
  if (p.query_rel.data != nullptr)
    t.query_rel = workspace.take(floats(heads(p.query_rel) * t.query_terms * W * t.rank_pitch));
  if (p.key_rel.data != nullptr)
    t.key_rel = workspace.take(floats(heads(p.key_rel) * t.key_terms * W * t.channel_pitch));
  if (p.bias.data != nullptr) t.bias = static_cast<float*>(workspace.take(p.heads * W));
  if (p.value_conv.data != nullptr) t.taps = static_cast<float*>(workspace.take(p.heads * W * t.channel_pitch));
  if (p.key_rel.data != nullptr && p.clips())
    t.key_edges = static_cast<float*>(workspace.take(p.batch * p.heads * 2 * p.keys));
  if (backward && p.has_query_columns() && p.clips())
    t.query_edges = static_cast<float*>(workspace.take(p.batch * p.heads * 2 * p.queries));
  t.vectors = whole_vectors(p.q, p.channels, p.dtype) && whole_vectors(p.k, p.channels, p.dtype) &&
              whole_vectors(p.v, p.channels, p.dtype);
  t.rank_vectors = whole_vectors(p.rel_query, p.rank, p.dtype);
  return workspace.bytes();
}

// Enters where partial sums go. Returns what is left of the workspace.
Workspace assign(AttentionBackward& p, const AttentionPlan& plan, Workspace workspace) {
  p.query_parts = plan.query_parts;
  p.key_parts = plan.key_parts;
  p.tap_parts = plan.tap_parts;
  const int64_t heads = p.batch * p.heads, W = p.window();
  p.delta = workspace.take(heads * p.queries);
  if (p.grad_bias != nullptr) p.partial_bias = workspace.take(heads * p.query_parts * W);
  if (p.grad_query_rel != nullptr) p.partial_query_rel = workspace.take(heads * p.query_parts * W * p.rank);
  if (p.grad_key_rel != nullptr) p.partial_key_rel = workspace.take(heads * p.key_parts * W * p.channels);
  if (p.needs_taps()) p.partial_taps = workspace.take(heads * p.tap_parts * (W + 1) * p.channels);
  return workspace;
}

}  // namespace

AttentionFacts facts_of(const Attention& p) {
  AttentionFacts f;
  f.batch = p.batch;
  f.queries = p.queries;
  f.keys = p.keys;
  f.heads = p.heads;
  f.groups = p.groups;
  f.channels = p.channels;
  f.rank = p.rank;
  f.window = p.window();
  f.sequences = p.sequences;
  f.dtype = p.dtype;
  f.packed = p.query_offsets != nullptr;
  f.relative = p.has_columns();
  f.query_rel = p.query_rel.data != nullptr;
  f.key_rel = p.key_rel.data != nullptr;
  f.low_rank = p.rel_query.data != nullptr;
  f.positive_scale = p.scale > 0;
  f.boxes = whole_boxes(p.q, p.queries, p.heads, p.batch) && whole_boxes(p.k, p.keys, p.groups, p.batch) &&
            whole_boxes(p.v, p.keys, p.groups, p.batch);
  f.device = current_device();
  return f;
}

AttentionLaunch prepare(const AttentionForward& p) {
  const AttentionPlan plan = plan_attention(facts_of(p), false);
  TensorTables tables;
  return {plan, assign(tables, p, plan, false, Workspace(nullptr, p.dtype))};
}

const char* attention_forward(const AttentionForward& p, const AttentionLaunch& launch, void* workspace,
                              Stream stream) {
  if (const char* reason = check_size(p)) return reason;
  const AttentionPlan& plan = launch.plan;
  return with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if constexpr (sizeof(T) <= 4)
      if (plan.family != AttentionFamily::kPlain) {
        TensorTables tables;
        assign(tables, p, plan, false, Workspace(workspace, p.dtype));
        tables.vectors = tables.vectors && whole_vectors(p.out, p.channels, p.dtype);
        if (const char* status = TensorAttention<T>::prepare(p, tables, stream)) return status;
        return plan.family == AttentionFamily::kTensor ? TensorAttention<T>::forward(p, tables, plan, stream)
                                                       : WarpgroupsOf<T>::forward(p, tables, plan, stream);
      }
    return PlainAttention<T>::forward(p, stream);
  });
}

AttentionLaunch prepare(const AttentionBackward& p) {
  AttentionFacts facts = facts_of(p);
  facts.boxes = facts.boxes && whole_boxes(p.grad, p.queries, p.heads, p.batch);
  const AttentionPlan plan = plan_attention(facts, true);
  AttentionBackward copy = p;
  TensorTables tables;
  return {plan, assign(tables, p, plan, true, assign(copy, plan, Workspace(nullptr, p.dtype)))};
}

const char* attention_backward(AttentionBackward p, const AttentionLaunch& launch, void* workspace, Stream stream) {
  if (const char* reason = check_size(p)) return reason;
  const AttentionPlan& plan = launch.plan;
  TensorTables tables;
  assign(tables, p, plan, true, assign(p, plan, Workspace(workspace, p.dtype)));
  for (const HeadRows* rows : {&p.out, &p.grad, &p.grad_q, &p.grad_k, &p.grad_v})
    tables.vectors = tables.vectors && whole_vectors(*rows, p.channels, p.dtype);
  tables.rank_vectors = tables.rank_vectors && whole_vectors(p.grad_rel_query, p.rank, p.dtype);
  return with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool queries = p.needs_queries() || p.needs_keys(), keys = p.needs_keys() || p.grad_v.data != nullptr;
    const char* status = nullptr;
    if (plan.family != AttentionFamily::kPlain) {
      if constexpr (sizeof(T) <= 4) {
        const auto of = [](AttentionFamily family, auto* warpgroups, auto* tensor) {
          return family == AttentionFamily::kWarpgroup ? warpgroups : tensor;
        };
        if (queries || keys) status = TensorAttention<T>::prepare(p, tables, stream);
        if (status == nullptr && queries)
          status = of(plan.family, WarpgroupsOf<T>::queries, TensorAttention<T>::queries)(p, tables, plan, stream);
        if (status == nullptr && keys)
          status = of(plan.key_family, WarpgroupsOf<T>::keys, TensorAttention<T>::keys)(p, tables, plan, stream);
      }
    } else {
      if (queries) status = PlainAttention<T>::queries(p, stream);
      if (status == nullptr && keys) status = PlainAttention<T>::keys(p, stream);
    }
    if (status == nullptr && p.needs_taps()) status = PlainAttention<T>::taps(p, stream);
    return status == nullptr ? ReduceAttention<Compute<T>>::tables(p, stream) : status;
  });
}

}  // namespace ck::cuda
