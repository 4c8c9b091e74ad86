#include "csrc/cuda/attention/reduce.cuh"

#include "csrc/cuda/attention/families.h"

namespace ck::cuda {

namespace {

// The gradient of one table, where it is wanted.
template <class C>
const char* reduce(const HeadTable& table, void* grad, const PartialSums& partial, int64_t rows, int64_t columns,
                   double factor, const HeadTable& scale, Stream stream) {
  if (grad == nullptr) return nullptr;
  const int64_t elements = (table.per_head ? partial.heads : 1) * rows * columns;
  if (elements == 0) return nullptr;
  return launch(reduce_table<C>, dim3(static_cast<unsigned>(ceil_div(elements, 32))), dim3(kSumThreads), 0, stream,
                partial, table, grad, rows, columns, factor, scale);
}

}  // namespace

template <class C>
const char* ReduceAttention<C>::tables(const AttentionBackward& p, Stream stream) {
  const int64_t W = p.window(), D = p.channels, R = p.rank;
  const PartialSums bias{p.partial_bias, p.batch, p.heads, p.query_parts, W, 0, 0, 1};
  const PartialSums query_rel{p.partial_query_rel, p.batch, p.heads, p.query_parts, W * R, 0, 1, R};
  // Its columns run backwards.
  const PartialSums key_rel{p.partial_key_rel, p.batch, p.heads, p.key_parts, W * D, (W - 1) * D, 1, -D};
  const PartialSums taps{p.partial_taps, p.batch, p.heads, p.tap_parts, (W + 1) * D, 0, 1, D};
  PartialSums tap_bias = taps;
  tap_bias.start = W * D;
  const char* status = reduce<C>(p.bias, p.grad_bias, bias, 1, W, 1, {}, stream);
  if (status == nullptr) status = reduce<C>(p.query_rel, p.grad_query_rel, query_rel, R, W, p.rel_scale, {}, stream);
  if (status == nullptr) status = reduce<C>(p.key_rel, p.grad_key_rel, key_rel, D, W, p.scale, {}, stream);
  if (status == nullptr) status = reduce<C>(p.value_conv, p.grad_value_conv, taps, D, W, 1, p.value_conv_scale, stream);
  if (status == nullptr)
    status = reduce<C>(p.value_conv_bias, p.grad_value_conv_bias, tap_bias, D, 1, 1, p.value_conv_scale, stream);
  if (status == nullptr && p.grad_value_conv_scale != nullptr)
    status = launch(reduce_tap_scale<C>, dim3(static_cast<unsigned>(p.heads)), dim3(kSumThreads), 0, stream, p, taps);
  return status;
}

template struct ReduceAttention<float>;
template struct ReduceAttention<double>;

}  // namespace ck::cuda
