// The arguments of attention and attention_grad as a ck::Attention. Schemas, fakes and autograd live in
// convkernels/ops; here whatever could make a kernel leave its memory is refused.
//
// Of a library's Target (operators.h) this uses, as for the convolutions:
//   Device device;  void set_seed(P&, const Tensor&);
//   void set_offsets(P&, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k);
#pragma once

#include <tuple>

#include "csrc/common/attention.h"
#include "csrc/torch/tensors.h"

namespace ck::binding {

// The optional tensors of a call.
struct AttentionOptions {
  Optional seed, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale, key_mask,
      cu_seqlens_q, cu_seqlens_k;
};

// A [batch, time, heads, channels] tensor of these sizes and of q's dtype.
inline HeadRows head_rows(const View& t, ScalarType type, std::initializer_list<int64_t> size, const char* argument,
                          const char* expected) {
  require(t.dim == 4 && t.type == type && std::equal(size.begin(), size.end(), t.size), argument, expected);
  return {t.data, t.step(0), t.step(1), t.step(2), t.stride[3]};
}

// A [batch, heads, time] tensor of the type that results are accumulated in.
inline HeadScalars head_scalars(const View& t, const Attention& p, const char* argument) {
  require(t.dim == 3 && t.type == (p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float) &&
              t.size[0] == p.batch && t.size[1] == p.heads && t.size[2] == p.queries,
          argument, "[batch, heads, time], float64 if q is float64, float32 otherwise");
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

inline Dtype table_dtype(const View& t, const Attention& p, const char* argument) {
  const Dtype dtype = float_dtype(t.type, argument);
  require((dtype == Dtype::kFloat64) == (p.dtype == Dtype::kFloat64), argument, "float64 if and only if q is float64");
  return dtype;
}

// [heads, rows, window], or without heads where `shared` is allowed.
inline HeadTable set_table(const Device& device, const Optional& tensor, const Attention& p, int64_t rows, bool shared,
                           const char* argument, const char* expected) {
  if (!tensor) return {};
  const View t(device, *tensor, argument);
  require(t.dim == 3 || (shared && t.dim == 2), argument, expected);
  const int64_t row = t.dim - 2;
  require((row == 0 || t.size[0] == p.heads) && t.size[row] == rows && t.size[row + 1] == p.window(), argument,
          expected);
  return {t.data, table_dtype(t, p, argument), row == 1, row == 1 ? t.stride[0] : 0, t.stride[row], t.stride[row + 1]};
}

inline void set_depthwise(Attention& p, const Device& device, const AttentionOptions& o) {
  p.value_conv = set_table(device, o.value_conv, p, p.channels, false, "value_conv", "[heads, channels, window]");
  require(o.value_conv || !(o.value_conv_bias || o.value_conv_scale), "value_conv",
          "a tensor, because value_conv_bias or value_conv_scale is given");
  if (o.value_conv_bias) {
    const View t(device, *o.value_conv_bias, "value_conv_bias");
    require(t.dim == 2 && t.size[0] == p.heads && t.size[1] == p.channels, "value_conv_bias", "[heads, channels]");
    p.value_conv_bias = {t.data, table_dtype(t, p, "value_conv_bias"), true, t.stride[0], t.stride[1], 0};
  }
  if (o.value_conv_scale) {
    const View t(device, *o.value_conv_scale, "value_conv_scale");
    require(t.dim == 1 && t.size[0] == p.heads, "value_conv_scale", "[heads]");
    p.value_conv_scale = {t.data, table_dtype(t, p, "value_conv_scale"), true, t.stride[0], 0, 0};
  }
}

inline void set_window(Attention& p, int64_t left, int64_t right, int64_t outside, const AttentionOptions& o) {
  constexpr int64_t kMost = int64_t{1} << 60;
  require(left >= 0 && left < kMost, "left", "a number >= 0 and below 2^60");
  require(right >= 0 && right < kMost, "right", "a number >= 0 and below 2^60");
  require(outside >= 0 && outside <= 2, "outside", "0, 1 or 2");
  p.outside = static_cast<Outside>(outside);
  p.left = left;
  p.right = right;
  if (!o.bias && !o.query_rel && !o.key_rel && !o.value_conv) {  // no offset is further
    p.left = std::min(left, p.queries + p.keys);
    p.right = std::min(right, p.queries + p.keys);
  }
}

// Fills what forward and backward have in common.
template <class P, class Target>
void set_attention(P& p, Target& target, const View& q, const View& k, const View& v, int64_t left, int64_t right,
                   int64_t outside, bool causal, bool qk, double scale, double rel_scale, double dropout,
                   const AttentionOptions& o) {
  const Device& device = target.device;
  require(q.dim == 4 && q.size[2] > 0 && q.size[3] > 0, "q",
          "[batch, time, heads, channels] with at least one head and one channel");
  p.dtype = float_dtype(q.type, "q");
  p.batch = q.size[0];
  p.queries = q.size[1];
  p.heads = q.size[2];
  p.channels = p.rank = q.size[3];
  p.q = head_rows(q, q.type, {p.batch, p.queries, p.heads, p.channels}, "q", "four dimensions");
  require(k.dim == 4 && k.size[2] > 0 && p.heads % k.size[2] == 0, "k",
          "[batch, keys, groups, channels] with a number of groups that divides the heads");
  p.keys = k.size[1];
  p.groups = k.size[2];
  p.k = head_rows(k, q.type, {p.batch, p.keys, p.groups, p.channels}, "k", "q's dtype, batch size and channels");
  p.v = head_rows(v, q.type, {p.batch, p.keys, p.groups, p.channels}, "v", "the shape and dtype of k");
  set_window(p, left, right, outside, o);
  p.causal = causal;
  p.qk = qk;
  p.scale = scale;
  p.rel_scale = rel_scale;

  if (o.rel_query) {
    require(o.query_rel.has_value(), "query_rel", "a tensor, because rel_query is given");
    const View r(device, *o.rel_query, "rel_query");
    require(r.dim == 4, "rel_query", "four dimensions");
    p.rank = r.size[3];
    p.rel_query = head_rows(r, q.type, {p.batch, p.queries, p.heads, p.rank}, "rel_query",
                            "[batch, time, heads, rank] of q's dtype");
  }
  if (o.bias) {
    const View t(device, *o.bias, "bias");
    require(t.dim == 2 && t.size[0] == p.heads && t.size[1] == p.window(), "bias", "[heads, window]");
    p.bias = {t.data, table_dtype(t, p, "bias"), true, t.stride[0], 0, t.stride[1]};
  }
  p.query_rel = set_table(device, o.query_rel, p, p.rank, true, "query_rel", "[rank, window] or [heads, rank, window]");
  p.key_rel =
      set_table(device, o.key_rel, p, p.channels, true, "key_rel", "[channels, window] or [heads, channels, window]");
  set_depthwise(p, device, o);

  if (o.key_mask) {
    const View mask(device, *o.key_mask, "key_mask");
    require(mask.dim == 2 && mask.type == ScalarType::Bool && mask.size[0] == p.batch && mask.size[1] == p.keys,
            "key_mask", "bool [batch, keys]");
    p.key_mask = static_cast<const bool*>(mask.data);
    p.mask_batch = mask.stride[0];
    p.mask_key = mask.stride[1];
  }
  require(o.cu_seqlens_q.has_value() == o.cu_seqlens_k.has_value(), "cu_seqlens_k",
          "boundaries if and only if cu_seqlens_q is given");
  if (o.cu_seqlens_q) {
    const View of_queries(device, *o.cu_seqlens_q, "cu_seqlens_q"), of_keys(device, *o.cu_seqlens_k, "cu_seqlens_k");
    require(p.batch == 1, "q", "one batch row, because cu_seqlens_q is given");
    require(of_queries.dim == 1 && of_queries.size[0] >= 1, "cu_seqlens_q", "one dimension, at least one number");
    require(of_keys.dim == 1 && of_keys.size[0] == of_queries.size[0], "cu_seqlens_k", "the shape of cu_seqlens_q");
    p.sequences = of_queries.size[0] - 1;
    target.set_offsets(p, *o.cu_seqlens_q, *o.cu_seqlens_k);
  }
  require(dropout >= 0.0 && dropout <= 1.0, "dropout", "a probability");
  p.dropout = dropout;
  if (dropout > 0.0) {
    require(o.seed.has_value() && o.seed->scalar_type() == ScalarType::Long && o.seed->numel() == 1, "seed",
            "one int64 number if dropout > 0");
    target.set_seed(p, checked(device, *o.seed, "seed"));
  }
}

// Allocates out and lse, and enters them into p.
template <class P>
std::tuple<Tensor, Tensor> set_attention_results(P& p, const Device& device, const Tensor& q, const View& query) {
  Tensor out = allocate_like(device, q, query);
  Tensor lse = allocate(device, {p.batch, p.heads, p.queries},
                        p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float);
  p.out = head_rows(View(out), query.type, {p.batch, p.queries, p.heads, p.channels}, "out", "the shape of q");
  p.lse = head_scalars(View(lse), p, "lse");
  return {out, lse};
}

using AttentionGradTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The bits of attention_grad's `needs`, in the order of its results.
enum AttentionNeed : int64_t {
  kNeedQ = 1,
  kNeedK = 2,
  kNeedV = 4,
  kNeedScoreBias = 8,
  kNeedQueryRel = 16,
  kNeedRelQuery = 32,
  kNeedKeyRel = 64,
  kNeedValueConv = 128,
  kNeedValueConvBias = 256,
  kNeedValueConvScale = 512,
};

// Allocates the gradients that `needs` asks for, and enters them into p.
template <class P>
AttentionGradTensors set_attention_gradients(P& p, const Device& device, const Tensor& grad, const Optional& grad_lse,
                                             const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                                             const Tensor& v, const AttentionOptions& o, int64_t needs) {
  const View query(q);
  p.grad = head_rows(View(device, grad, "grad"), query.type, {p.batch, p.queries, p.heads, p.channels}, "grad",
                     "the shape and dtype of q");
  p.out = head_rows(View(device, out, "out"), query.type, {p.batch, p.queries, p.heads, p.channels}, "out",
                    "the shape and dtype of q");
  p.lse = head_scalars(View(device, lse, "lse"), p, "lse");
  if (grad_lse) p.grad_lse = head_scalars(View(device, *grad_lse, "grad_lse"), p, "grad_lse");
  const auto rows = [&](AttentionNeed bit, const Optional& t, HeadRows& out) {
    if (!(needs & bit) || !t) return allocate(device, {0}, query.type);
    const View like(*t);
    Tensor result = allocate_like(device, *t, like);
    const View view(result);
    out = {view.data, view.step(0), view.step(1), view.step(2), view.stride[3]};
    return result;
  };
  const auto table = [&](AttentionNeed bit, const Optional& t, void*& out) {
    const View like(t ? *t : q);
    if (!(needs & bit) || !t) return allocate(device, {0}, like.type);
    Tensor result = allocate_contiguous(device, like);
    out = result.mutable_data_ptr();
    return result;
  };
  return {rows(kNeedQ, q, p.grad_q),
          rows(kNeedK, k, p.grad_k),
          rows(kNeedV, v, p.grad_v),
          table(kNeedScoreBias, o.bias, p.grad_bias),
          table(kNeedQueryRel, o.query_rel, p.grad_query_rel),
          rows(kNeedRelQuery, o.rel_query, p.grad_rel_query),
          table(kNeedKeyRel, o.key_rel, p.grad_key_rel),
          table(kNeedValueConv, o.value_conv, p.grad_value_conv),
          table(kNeedValueConvBias, o.value_conv_bias, p.grad_value_conv_bias),
          table(kNeedValueConvScale, o.value_conv_scale, p.grad_value_conv_scale)};
}

}  // namespace ck::binding
