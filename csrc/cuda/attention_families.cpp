// From an attention to the launches that compute it. No device code.
#include "attention_families.h"

#include <initializer_list>
#include <type_traits>

#include "../common/switch.h"
#include "rooms.h"

namespace ck::cuda {

int64_t multiprocessors();

namespace {

constexpr int64_t kVectorBytes = 16;

void look_at(AttentionFacts& f, const HeadRows& rows, int64_t channels) {
  if (rows.data == nullptr) return;
  const int64_t size = size_of(f.dtype);
  const auto whole = [&](int64_t stride) { return stride * size % kVectorBytes == 0; };
  f.channel_vectors = f.channel_vectors && rows.channel == 1 && whole(channels) && whole(rows.batch) &&
                      whole(rows.time) && whole(rows.head) &&
                      reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0;
}

AttentionFacts common_facts(const Attention& p) {
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
  f.query_rel = p.query_rel.data != nullptr;
  f.key_rel = p.key_rel.data != nullptr;
  f.bias = p.bias.data != nullptr;
  f.dropout = p.seed != nullptr;
  f.multiprocessors = multiprocessors();
  for (const HeadRows* rows : {&p.q, &p.k, &p.v}) look_at(f, *rows, p.channels);
  look_at(f, p.rel_query, p.rank);
  return f;
}

// Positions are counted in 32 bits.
const char* check_size(const Attention& p) {
  constexpr int64_t kMost = int64_t{1} << 28;
  return p.queries < kMost && p.keys < kMost && p.left < kMost && p.right < kMost
             ? nullptr
             : "attention: expected fewer than 2^28 queries, keys and columns";
}

// Enters where partial sums go. Returns the bytes they take.
int64_t assign(AttentionBackward& p, const AttentionPlan& plan, void* workspace) {
  p.query_parts = plan.query_parts;
  p.key_parts = plan.key_parts;
  p.tap_parts = plan.tap_parts;
  Rooms rooms(workspace, p.dtype);
  const int64_t units = p.batch * p.heads, W = p.window();
  p.delta = rooms.take(units * p.queries);
  if (p.grad_bias != nullptr) p.partial_bias = rooms.take(units * p.query_parts * W);
  if (p.grad_query_rel != nullptr) p.partial_query_rel = rooms.take(units * p.query_parts * W * p.rank);
  if (p.grad_key_rel != nullptr) p.partial_key_rel = rooms.take(units * p.key_parts * W * p.channels);
  if (p.needs_taps()) p.partial_taps = rooms.take(units * p.tap_parts * (W + 1) * p.channels);
  return rooms.used();
}

}  // namespace

AttentionFacts facts_of(const AttentionForward& p) {
  AttentionFacts f = common_facts(p);
  look_at(f, p.out, p.channels);
  return f;
}

AttentionFacts facts_of(const AttentionBackward& p) {
  AttentionFacts f = common_facts(p);
  for (const HeadRows* rows : {&p.out, &p.grad, &p.grad_q, &p.grad_k, &p.grad_v}) look_at(f, *rows, p.channels);
  look_at(f, p.grad_rel_query, p.rank);
  return f;
}

int64_t workspace_bytes(const AttentionForward&) { return 0; }

const char* attention(AttentionForward p, void*, Stream stream) {
  if (const char* reason = check_size(p)) return reason;
  return with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    return PlainAttention<T>::forward(p, stream);
  });
}

int64_t workspace_bytes(const AttentionBackward& p) {
  AttentionBackward copy = p;
  return assign(copy, plan_attention(facts_of(p), true), nullptr);
}

const char* attention_grad(AttentionBackward p, void* workspace, Stream stream) {
  if (const char* reason = check_size(p)) return reason;
  const AttentionPlan plan = plan_attention(facts_of(p), true);
  assign(p, plan, workspace);
  return with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using Kernels = PlainAttention<T>;
    const char* status = nullptr;
    if (p.needs_queries() || p.needs_keys()) status = Kernels::queries(p, stream);
    if (status == nullptr && (p.needs_keys() || p.grad_v.data != nullptr)) status = Kernels::keys(p, stream);
    if (status == nullptr && p.needs_taps()) status = PlainAttention<T>::taps(p, stream);
    return status == nullptr ? ReduceAttention<Compute<T>>::tables(p, stream) : status;
  });
}

}  // namespace ck::cuda
