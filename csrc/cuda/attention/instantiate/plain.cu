// For all types: little code for each.
#include "csrc/cuda/attention/families.h"
#include "csrc/cuda/attention/instantiate/launch.cuh"
#include "csrc/cuda/attention/plain_backward_keys.cuh"
#include "csrc/cuda/attention/plain_backward_queries.cuh"
#include "csrc/cuda/attention/reduce.cuh"

namespace ck::cuda {

template <class T>
constexpr int64_t kSize = sizeof(Compute<T>);

template <class T>
const char* PlainAttention<T>::forward(const AttentionForward& p, Stream stream) {
  const int64_t tiles = attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kPlainTileRows);
  const int64_t slices = plain_slices(p.channels);
  return launch_blocks(attention_plain<T>, slices * tiles * p.batch * p.heads, kPlainTileThreads,
                       kPlainForwardNumbers * kSize<T>, stream, p, tiles, slices);
}

template <class T>
const char* PlainAttention<T>::queries(const AttentionBackward& p, Stream stream) {
  const int64_t tiles = attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kPlainTileRows);
  const int64_t slices = plain_slices(p.query_rel.data != nullptr ? max(p.channels, p.rank) : p.channels);
  return launch_blocks(attention_plain_queries<T>, slices * p.query_parts * p.batch * p.heads, kPlainTileThreads,
                       kPlainQueryNumbers * kSize<T>, stream, p, tiles, slices);
}

template <class T>
const char* PlainAttention<T>::keys(const AttentionBackward& p, Stream stream) {
  const int64_t tiles = attention_tiles(p.keys, p.sequences, p.query_offsets != nullptr, kPlainTileKeys);
  const int64_t slices = plain_slices(p.channels);
  return launch_blocks(attention_plain_keys<T>, slices * p.key_parts * p.batch * p.groups, kPlainTileThreads,
                       kPlainKeyNumbers * kSize<T>, stream, p, tiles, slices);
}

template <class T>
const char* PlainAttention<T>::taps(const AttentionBackward& p, Stream stream) {
  const int64_t tiles = attention_tiles(p.queries, p.sequences, p.query_offsets != nullptr, kTapRows);
  return launch_blocks(attention_taps<T>, p.tap_parts * p.batch * p.heads, kSumThreads, 0, stream, p, tiles);
}

template struct PlainAttention<float>;
template struct PlainAttention<double>;
template struct PlainAttention<bf16>;
template struct PlainAttention<f16>;

}  // namespace ck::cuda
