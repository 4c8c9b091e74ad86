// Included once per type, with CK_TYPE defined.
#include "csrc/cuda/attention/backward_keys.cuh"
#include "csrc/cuda/attention/backward_queries.cuh"
#include "csrc/cuda/attention/families.h"
#include "csrc/cuda/attention/forward.cuh"
#include "csrc/cuda/attention/instantiate/launch.cuh"
#include "csrc/cuda/attention/tables.cuh"

namespace ck::cuda {

template <class T>
const char* TensorAttention<T>::prepare(const Attention& p, const TensorTables& t, Stream stream) {
  const char* status = nullptr;
  if (t.query_rel != nullptr || t.key_rel != nullptr || t.bias != nullptr || t.taps != nullptr) {
    const int64_t elements = p.heads * p.window() * max(t.rank_pitch, t.channel_pitch);
    status = launch_blocks(attention_tables<T>, min(ceil_div(elements, kTensorThreads), int64_t{1024}), kTensorThreads,
                           0, stream, p, t);
  }
  const int64_t units = p.batch * p.heads;
  if (status == nullptr && t.key_edges != nullptr)
    status = launch_blocks(attention_edges<T>, ceil_div(units * p.keys, kTensorWarps), kTensorThreads, 0, stream, p,
                           t.key_edges, true);
  if (status == nullptr && t.query_edges != nullptr)
    status = launch_blocks(attention_edges<T>, ceil_div(units * p.queries, kTensorWarps), kTensorThreads, 0, stream, p,
                           t.query_edges, false);
  return status;
}

template <class T>
const char* TensorAttention<T>::forward(const AttentionForward& p, const TensorTables& t, const AttentionPlan& plan,
                                        Stream stream) {
  return with_channels<kTensorChannels<T>>(plan.channels, [&](auto d) {
    constexpr int kChannels = decltype(d)::value;
    const int64_t tiles =
        attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kForwardRows<T, kChannels>);
    return launch_blocks(attention_forward<T, kChannels>, plan.query_parts * p.batch * p.heads, kTensorThreads,
                         plan.shared_bytes, stream, p, t, tiles, plan.query_parts, plan.resident);
  });
}

template <class T>
const char* TensorAttention<T>::queries(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan,
                                        Stream stream) {
  return with_channels<kTensorChannels<T>>(plan.channels, [&](auto d) {
    return launch_blocks(attention_backward_queries<T, decltype(d)::value>,
                         p.query_parts / kTensorWarps * p.batch * p.heads, kTensorThreads, plan.shared_bytes, stream, p,
                         t, attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kGradRows));
  });
}

template <class T>
const char* TensorAttention<T>::keys(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan,
                                     Stream stream) {
  return with_channels<kTensorChannels<T>>(plan.channels, [&](auto d) {
    constexpr int kChannels = decltype(d)::value;
    const auto launch_pass = [&](auto kernel) {
      return launch_blocks(kernel, p.key_parts / kTensorWarps * p.batch * p.groups, kTensorThreads,
                           plan.key_shared_bytes, stream, p, t,
                           attention_tiles(p.keys, p.sequences, p.query_offsets != nullptr, kGradRows));
    };
    if constexpr (!kWide<T, kChannels>) {
      return launch_pass(attention_backward_keys<T, kChannels, true, true>);
    } else {
      const char* status = nullptr;
      if (p.needs_keys()) status = launch_pass(attention_backward_keys<T, kChannels, true, false>);
      if (status == nullptr && p.grad_v.data != nullptr)
        status = launch_pass(attention_backward_keys<T, kChannels, false, true>);
      return status;
    }
  });
}

template struct TensorAttention<CK_TYPE>;

}  // namespace ck::cuda
