// Included once per type, with CK_TYPE defined.
#include "csrc/cuda/attention/backward_keys_warpgroups.cuh"
#include "csrc/cuda/attention/backward_queries_warpgroups.cuh"
#include "csrc/cuda/attention/families.h"
#include "csrc/cuda/attention/forward_warpgroups.cuh"
#include "csrc/cuda/attention/instantiate/launch.cuh"

namespace ck::cuda {

// The map of a tensor of 16-bit numbers, of which `box` positions are read at a time.
inline const char* map_of(TensorMap& map, const HeadRows& rows, int64_t channels, int64_t positions, int64_t heads,
                          int64_t batch, int box) {
  // The stride of a dimension of size 1 can be anything, but not for a map.
  const auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? int64_t{kVectorBytes} : 2 * stride; };
  return make_tensor_map(map, rows.data, {channels, positions, heads, batch},
                         {bytes(positions, rows.time), bytes(heads, rows.head), bytes(batch, rows.batch)}, box);
}

// Of q, k and v, and in the backward pass of the gradient.
struct Maps {
  TensorMap q, k, v, grad;

  const char* make(const Attention& p, int box) {
    const char* status = map_of(q, p.q, p.channels, p.queries, p.heads, p.batch, box);
    if (status == nullptr) status = map_of(k, p.k, p.channels, p.keys, p.groups, p.batch, box);
    if (status == nullptr) status = map_of(v, p.v, p.channels, p.keys, p.groups, p.batch, box);
    return status;
  }
  const char* make(const Attention& p, const HeadRows& gradient, int box) {
    const char* const status = make(p, box);
    return status != nullptr ? status : map_of(grad, gradient, p.channels, p.queries, p.heads, p.batch, box);
  }
};

template <class T>
const char* WarpgroupAttention<T>::forward(const AttentionForward& p, const TensorTables& t, const AttentionPlan& plan,
                                           Stream stream) {
  if (plan.query_parts == 0) return nullptr;
  Maps maps;
  if (const char* status = maps.make(p, kWarpgroupKeys)) return status;
  const int64_t tiles = attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kWarpgroupRows);
  if (tiles * p.batch * p.heads > INT32_MAX / 2) return "attention: too many tiles";
  return with_channels(plan.channels, [&](auto d) {
    return launch_blocks(attention_forward_warpgroups<T, decltype(d)::value>, plan.query_parts, kWarpgroupThreads,
                         plan.shared_bytes, stream, p, t, maps.q, maps.k, maps.v, static_cast<int>(tiles),
                         static_cast<int>(plan.stages));
  });
}

template <class T>
const char* WarpgroupAttention<T>::queries(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan,
                                           Stream stream) {
  Maps maps;
  if (const char* status = maps.make(p, p.grad, kWarpgroupGradKeys)) return status;
  const int64_t tiles = attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kWarpgroupRows);
  return with_channels(plan.channels, [&](auto d) {
    return launch_blocks(attention_backward_queries_warpgroups<T, decltype(d)::value>,
                         p.query_parts / kWarpgroupWarps * p.batch * p.heads, kWarpgroupThreads, plan.shared_bytes,
                         stream, p, t, maps.q, maps.k, maps.v, maps.grad, static_cast<int>(tiles),
                         static_cast<int>(plan.stages));
  });
}

template <class T>
const char* WarpgroupAttention<T>::keys(const AttentionBackward& p, const TensorTables& t, const AttentionPlan& plan,
                                        Stream stream) {
  const int64_t tiles = attention_tiles(p.keys, p.sequences, p.query_offsets != nullptr, kWarpgroupRows);
  return with_channels(plan.channels, [&](auto d) {
    constexpr int kChannels = decltype(d)::value;
    Maps maps;
    if (const char* status = maps.make(p, p.grad, kWarpgroupQueries<kChannels>)) return status;
    return launch_blocks(attention_backward_keys_warpgroups<T, kChannels>,
                         p.key_parts / kWarpgroupWarps * p.batch * p.groups, kWarpgroupThreads, plan.key_shared_bytes,
                         stream, p, t, maps.q, maps.k, maps.v, maps.grad, static_cast<int>(tiles),
                         static_cast<int>(plan.key_stages));
  });
}

template struct WarpgroupAttention<CK_TYPE>;

}  // namespace ck::cuda
