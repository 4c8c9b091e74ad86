// Included once per type, with CK_TYPE defined.
#include "csrc/cuda/attention/families.h"
#include "csrc/cuda/attention/forward_warpgroups.cuh"
#include "csrc/cuda/attention/instantiate/launch.cuh"

namespace ck::cuda {

namespace {

// The map of a tensor of 16-bit numbers, read 128 positions at a time.
const char* map_of(TensorMap& map, const HeadRows& rows, int64_t channels, int64_t positions, int64_t heads,
                   int64_t batch) {
  // The stride of a dimension of size 1 can be anything, but not for a map.
  const auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? int64_t{kVectorBytes} : 2 * stride; };
  return make_tensor_map(map, rows.data, {channels, positions, heads, batch},
                         {bytes(positions, rows.time), bytes(heads, rows.head), bytes(batch, rows.batch)},
                         kWarpgroupKeys);
}

}  // namespace

template <class T>
const char* WarpgroupAttention<T>::forward(const AttentionForward& p, const TensorTables& t, const AttentionPlan& plan,
                                           Stream stream) {
  if (plan.query_parts == 0) return nullptr;
  TensorMap q, k, v;
  const char* status = map_of(q, p.q, p.channels, p.queries, p.heads, p.batch);
  if (status == nullptr) status = map_of(k, p.k, p.channels, p.keys, p.groups, p.batch);
  if (status == nullptr) status = map_of(v, p.v, p.channels, p.keys, p.groups, p.batch);
  if (status != nullptr) return status;
  const int64_t tiles = attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kWarpgroupRows);
  if (tiles * p.batch * p.heads > INT32_MAX / 2) return "attention: too many tiles";
  return with_channels(plan.channels, [&](auto d) {
    return launch_blocks(attention_forward_warpgroups<T, decltype(d)::value>, plan.query_parts, kWarpgroupThreads,
                         plan.shared_bytes, stream, p, t, q, k, v, static_cast<int>(tiles),
                         static_cast<int>(plan.stages));
  });
}

template struct WarpgroupAttention<CK_TYPE>;

}  // namespace ck::cuda
