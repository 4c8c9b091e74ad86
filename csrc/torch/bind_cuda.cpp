// The CUDA operators, registered through torch's stable C interface. No device code. With CK_SIMT the same kernels run
// on the host, and the operators take CPU tensors.
#include "csrc/cuda/attention/families.h"
#include "csrc/cuda/conv/families.h"
#include "csrc/torch/attention.h"
#include "csrc/torch/conv.h"

#if !defined(CK_SIMT)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using namespace ck::binding;

// The device of a call, current while this lives, and its current stream. Offsets and seeds stay where they are: to
// read them here would mean to wait for the device.
class Device {
 public:
#if defined(CK_SIMT)
  Device(const Tensor&, const char*) {}

  ck::cuda::Stream stream() const { return nullptr; }
#else
  Device(const Tensor& x, const char* argument) : place(place_of(x, argument)), guard_(place.index) {}

  ck::cuda::Stream stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
    return stream;
  }
#endif

  template <class P>
  void set_seed(P& p, const Tensor& seed) const {
    p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    p.drop_below = ck::drop_threshold(p.dropout);
    p.keep_scale = p.dropout < 1.0 ? 1.0 / (1.0 - p.dropout) : 0.0;
  }

  void set_offsets(ck::cuda::Problem& p, const Tensor& tensor, const View& cu_seqlens) {
    p.offsets = offsets_.data(place, tensor);
    p.wide_offsets = cu_seqlens.type == ScalarType::Long;
  }

  void set_offsets(ck::cuda::Attention& p, const Tensor& of_queries, const Tensor& of_keys) {
    const ScalarType query_type = View(of_queries).type, key_type = View(of_keys).type;
    require(query_type == ScalarType::Int || query_type == ScalarType::Long, "cu_seqlens_q", "dtype int32 or int64");
    require(key_type == ScalarType::Int || key_type == ScalarType::Long, "cu_seqlens_k", "dtype int32 or int64");
    p.query_offsets = offsets_.data(place, of_queries);
    p.key_offsets = key_offsets_.data(place, of_keys);
    p.wide_query_offsets = query_type == ScalarType::Long;
    p.wide_key_offsets = key_type == ScalarType::Long;
  }

  Place place;

 private:
#if !defined(CK_SIMT)
  static Place place_of(const Tensor& x, const char* argument) {
    const Place place = Place::of(x);
    require(place.type == aoti_torch_device_type_cuda(), argument, "a tensor on a CUDA device");
    return place;
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Contiguous offsets_, key_offsets_;
};

void check_status(const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string("convkernels cuda: ") + status);
}

Tensor tap_conv(Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax, bool renormalize, double dropout,
                Optional seed, Optional bias, Optional gate, Optional mask, Optional cu_seqlens,
                Optional initial_state) {
  ck::cuda::Forward p;
  Device device(x, "x");
  Copies copies;
  const View input(device.place, x, "x"), filter(device.place, weight, "weight");
  set_problem(p, device, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
              initial_state, copies);
  p.per_batch = filter.dim == 4;
  if (bias) set_bias(p, device.place, *bias, copies);
  Tensor y = allocate_like(device.place, x, input);
  p.y = rows_like(View(y), input, "y");
  if (p.batch * p.time * p.channels > 0) check_status(ck::cuda::forward(p, device.stream()));
  return y;
}

FiveTensors tap_grad(Tensor grad, Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax,
                     bool renormalize, double dropout, Optional seed, Optional gate, Optional mask, Optional cu_seqlens,
                     Optional initial_state, int64_t needs) {
  ck::cuda::Backward p;
  Device device(x, "x");
  Copies copies;
  const View input(device.place, x, "x"), filter(device.place, weight, "weight");
  set_problem(p, device, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
              initial_state, copies);
  p.per_batch = filter.dim == 4;
  FiveTensors results = set_gradients(p, device.place, grad, x, input, filter, gate, initial_state, needs);
  if (p.batch * p.time * p.channels == 0) return results;
  Tensor workspace = allocate(device.place, {ck::cuda::workspace_bytes(p)}, ScalarType::Byte);
  check_status(ck::cuda::backward(p, workspace.mutable_data_ptr(), device.stream()));
  return results;
}

Tensor tap_step(Tensor x, Tensor state, Tensor weight, int64_t dilation, bool softmax, bool renormalize, Optional bias,
                Optional gate, Optional state_index, Optional position) {
  ck::cuda::Step p;
  Device device(x, "x");
  Copies copies;
  const View input(device.place, x, "x");
  set_step(p, device.place, input, state, View(device.place, weight, "weight"), dilation, softmax, renormalize, bias,
           gate, state_index, position, copies);
  Tensor y = allocate_like(device.place, x, input);
  if (p.batch * p.channels == 0) return y;
  const View output(y);
  p.y = {output.data, output.stride[0], 0, output.stride[1]};
  p.next_state = state.mutable_data_ptr();
  Contiguous index;
  std::optional<Tensor> scratch;
  if (state_index) {
    p.state_row = static_cast<const int64_t*>(index.data(device.place, *state_index));
    scratch = allocate_contiguous(device.place, View(state));
    p.scratch = scratch->mutable_data_ptr();
  }
  check_status(ck::cuda::step(p, device.stream()));
  return y;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, int64_t left, int64_t right, int64_t outside,
                                     bool causal, bool qk, double scale, double rel_scale, double dropout,
                                     Optional seed, Optional bias, Optional query_rel, Optional rel_query,
                                     Optional key_rel, Optional value_conv, Optional value_conv_bias,
                                     Optional value_conv_scale, Optional key_mask, Optional cu_seqlens_q,
                                     Optional cu_seqlens_k) {
  ck::cuda::AttentionForward p;
  Device device(q, "q");
  const AttentionOptions options{seed,     bias,         query_rel,       rel_query,
                                 key_rel,  value_conv,   value_conv_bias, value_conv_scale,
                                 key_mask, cu_seqlens_q, cu_seqlens_k};
  const View query(device.place, q, "q");
  set_attention(p, device, query, View(device.place, k, "k"), View(device.place, v, "v"), left, right, outside, causal,
                qk, scale, rel_scale, dropout, options);
  std::tuple<Tensor, Tensor> results = set_attention_results(p, device.place, q, query);
  Tensor workspace = allocate(device.place, {ck::cuda::workspace_bytes(p)}, ScalarType::Byte);
  check_status(ck::cuda::attention(p, workspace.mutable_data_ptr(), device.stream()));
  return results;
}

TenTensors attention_grad(Tensor grad, Optional grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                          int64_t left, int64_t right, int64_t outside, bool causal, bool qk, double scale,
                          double rel_scale, double dropout, Optional seed, Optional bias, Optional query_rel,
                          Optional rel_query, Optional key_rel, Optional value_conv, Optional value_conv_bias,
                          Optional value_conv_scale, Optional key_mask, Optional cu_seqlens_q, Optional cu_seqlens_k,
                          int64_t needs) {
  ck::cuda::AttentionBackward p;
  Device device(q, "q");
  const AttentionOptions options{seed,     bias,         query_rel,       rel_query,
                                 key_rel,  value_conv,   value_conv_bias, value_conv_scale,
                                 key_mask, cu_seqlens_q, cu_seqlens_k};
  set_attention(p, device, View(device.place, q, "q"), View(device.place, k, "k"), View(device.place, v, "v"), left,
                right, outside, causal, qk, scale, rel_scale, dropout, options);
  TenTensors results = set_attention_gradients(p, device.place, grad, grad_lse, out, lse, q, k, v, options, needs);
  Tensor workspace = allocate(device.place, {ck::cuda::workspace_bytes(p)}, ScalarType::Byte);
  check_status(ck::cuda::attention_grad(p, workspace.mutable_data_ptr(), device.stream()));
  return results;
}

}  // namespace

#if defined(CK_SIMT)
STABLE_TORCH_LIBRARY_IMPL(convkernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(convkernels, CUDA, m) {
#endif
  m.impl("tap_conv.cuda", TORCH_BOX(&tap_conv));
  m.impl("_tap_conv.cuda", TORCH_BOX(&tap_conv));
  m.impl("tap_grad.cuda", TORCH_BOX(&tap_grad));
  m.impl("_tap_grad.cuda", TORCH_BOX(&tap_grad));
  m.impl("tap_step.cuda", TORCH_BOX(&tap_step));
  m.impl("_tap_step.cuda", TORCH_BOX(&tap_step));
  m.impl("attention.cuda", TORCH_BOX(&attention));
  m.impl("_attention.cuda", TORCH_BOX(&attention));
  m.impl("attention_grad.cuda", TORCH_BOX(&attention_grad));
  m.impl("_attention_grad.cuda", TORCH_BOX(&attention_grad));
}
