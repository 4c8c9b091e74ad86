// The CPU operators, registered through torch's stable C interface: one binary for every torch from 2.10 on.
#include <type_traits>

#include "csrc/cpu/dispatch.h"
#include "csrc/torch/attention.h"
#include "csrc/torch/conv.h"

namespace {

using namespace ck::binding;

// Packed offsets, read on the host.
std::vector<int64_t> read_offsets(const View& cu_seqlens, int64_t end, const char* argument) {
  require(cu_seqlens.type == ScalarType::Int || cu_seqlens.type == ScalarType::Long, argument, "dtype int32 or int64");
  std::vector<int64_t> offsets(static_cast<size_t>(cu_seqlens.size[0]));
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * cu_seqlens.stride[0];
    offsets[i] = cu_seqlens.type == ScalarType::Int ? static_cast<const int32_t*>(cu_seqlens.data)[at]
                                                    : static_cast<const int64_t*>(cu_seqlens.data)[at];
  }
  require(offsets.front() == 0 && offsets.back() == end, argument, "offsets from 0 to the length of the tensor");
  for (size_t i = 1; i < offsets.size(); ++i)
    require(offsets[i - 1] <= offsets[i], argument, "offsets that do not decrease");
  return offsets;
}

// Offsets, seeds and rows are read here.
struct Host {
  Place place;
  std::vector<int64_t> offsets, key_offsets, state_rows;

  template <class P>
  void set_seed(P& p, const Tensor& seed) const {
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  }

  void set_offsets(ck::cpu::Problem& p, const Tensor&, const View& cu_seqlens) {
    offsets = read_offsets(cu_seqlens, p.time, "cu_seqlens");
    p.offsets = offsets.data();
  }

  void set_offsets(ck::cpu::AttentionProblem& p, const Tensor& of_queries, const Tensor& of_keys) {
    offsets = read_offsets(View(of_queries), p.queries, "cu_seqlens_q");
    key_offsets = read_offsets(View(of_keys), p.keys, "cu_seqlens_k");
    p.query_offsets = offsets.data();
    p.key_offsets = key_offsets.data();
  }
};

void run_parallel(int64_t n, ck::cpu::ParallelBody body, void* context) {
  if (torch_parallel_for(0, n, 1, body, context) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("a worker thread failed (out of memory?)");
}

void set_threads(ck::cpu::Workers& p) {
  p.parallel_for = run_parallel;
  p.threads = static_cast<int64_t>(torch::stable::get_num_threads());
}

void check_status(const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string("convkernels cpu: ") + status);
}

// The part of a call that concerns batch row b alone.
template <class P>
P batch_row(const P& p, int64_t b) {
  P row = p;
  const int64_t size = ck::size_of(p.dtype), weight_size = ck::size_of(p.weight_dtype);
  const int64_t state_size = p.sequences * p.taps.span() * p.channels * size;
  const auto move = [b](auto*& pointer, int64_t bytes) {
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    if (pointer != nullptr) pointer = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(pointer) + b * bytes);
  };
  row.batch = 1;
  row.dropout_batch = b;
  move(row.x.data, p.x.batch * size);
  move(row.gate.data, p.gate.batch * size);
  move(row.mask, p.mask_batch);
  move(row.weight, p.weight_batch * weight_size);
  move(row.state, state_size);
  if constexpr (std::is_same_v<P, ck::cpu::Forward>) {
    move(row.y.data, p.y.batch * size);
  } else {
    move(row.grad.data, p.grad.batch * size);
    move(row.grad_x.data, p.grad_x.batch * size);
    move(row.grad_gate.data, p.grad_gate.batch * size);
    move(row.grad_weight, p.heads * p.taps.taps * weight_size);
    move(row.grad_state, state_size);
  }
  return row;
}

Tensor tap_conv(Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax, bool renormalize, double dropout,
                Optional seed, Optional bias, Optional gate, Optional mask, Optional cu_seqlens,
                Optional initial_state) {
  ck::cpu::Forward p;
  Host host;
  Copies copies;
  const View input(host.place, x, "x");
  const bool per_batch = set_problem(p, host, input, View(host.place, weight, "weight"), left, dilation, softmax,
                                     renormalize, dropout, seed, gate, mask, cu_seqlens, initial_state, copies);
  set_threads(p);
  if (bias) set_bias(p, host.place, *bias, copies);
  Tensor y = allocate_like(host.place, x, input);
  p.y = rows_like(View(y), input, "y");
  p.resident_output =
      ck::prepare_output(p.y.data, static_cast<size_t>(p.batch * p.time * p.channels * ck::size_of(p.dtype)));
  if (!per_batch) {
    check_status(ck::cpu::kernels().forward(p));
  } else {
    for (int64_t b = 0; b < p.batch; ++b) check_status(ck::cpu::kernels().forward(batch_row(p, b)));
  }
  return y;
}

FiveTensors tap_grad(Tensor grad, Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax,
                     bool renormalize, double dropout, Optional seed, Optional gate, Optional mask, Optional cu_seqlens,
                     Optional initial_state, int64_t needs) {
  ck::cpu::Backward p;
  Host host;
  Copies copies;
  const View input(host.place, x, "x"), filter(host.place, weight, "weight");
  const bool per_batch = set_problem(p, host, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate,
                                     mask, cu_seqlens, initial_state, copies);
  set_threads(p);
  FiveTensors results = set_gradients(p, host.place, grad, x, input, filter, gate, initial_state, needs);
  if (p.batch * p.time * p.channels == 0) return results;
  for (const Tensor* t : {&std::get<0>(results), &std::get<1>(results), &std::get<3>(results)})
    ck::prepare_output(t->mutable_data_ptr(), static_cast<size_t>(t->numel()) * t->element_size());
  if (!per_batch) {
    check_status(ck::cpu::kernels().backward(p));
  } else {
    if (p.grad_bias != nullptr) {  // the one gradient that is a sum over batch rows
      ck::cpu::Backward bias = p;
      bias.grad_x = bias.grad_gate = {};
      bias.grad_weight = bias.grad_state = nullptr;
      check_status(ck::cpu::kernels().backward(bias));
      p.grad_bias = nullptr;
    }
    for (int64_t b = 0; b < p.batch; ++b) check_status(ck::cpu::kernels().backward(batch_row(p, b)));
  }
  return results;
}

// The state moves up by one row after the output has been computed.
Tensor tap_step(Tensor x, Tensor state, Tensor weight, int64_t dilation, bool softmax, bool renormalize, Optional bias,
                Optional gate, Optional state_index, Optional position) {
  ck::cpu::Forward p;
  Host host;
  Copies copies;
  const View input(host.place, x, "x");
  set_step(p, host.place, input, state, View(host.place, weight, "weight"), dilation, softmax, renormalize, bias, gate,
           state_index, position, copies);
  set_threads(p);
  if (state_index) {
    const View index(*state_index);
    for (int64_t b = 0; b < p.batch; ++b) {
      host.state_rows.push_back(static_cast<const int64_t*>(index.data)[b * index.stride[0]]);
      require(host.state_rows.back() >= 0 && host.state_rows.back() < p.batch, "state_index", "rows of state");
    }
    p.state_row = host.state_rows.data();
  }
  Tensor y = allocate_like(host.place, x, input);
  if (p.batch * p.channels == 0) return y;
  const View output(y);
  p.y = {output.data, output.stride[0], 0, output.stride[1]};
  // Rows of the state that another row continues from are needed until all have been written.
  std::optional<Tensor> old;
  if (state_index && p.taps.span() > 0) {
    old = allocate_contiguous(host.place, View(state));
    torch::stable::copy_(*old, state);
    p.state = old->const_data_ptr();
  }
  check_status(ck::cpu::kernels().forward(p));
  if (p.taps.span() > 0) check_status(ck::cpu::kernels().shift_state(p, state.mutable_data_ptr()));
  return y;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, int64_t left, int64_t right, int64_t outside,
                                     bool causal, bool qk, double scale, double rel_scale, double dropout,
                                     Optional seed, Optional bias, Optional query_rel, Optional rel_query,
                                     Optional key_rel, Optional value_conv, Optional value_conv_bias,
                                     Optional value_conv_scale, Optional key_mask, Optional cu_seqlens_q,
                                     Optional cu_seqlens_k) {
  ck::cpu::AttentionForward p;
  Host host;
  const AttentionOptions options{seed,     bias,         query_rel,       rel_query,
                                 key_rel,  value_conv,   value_conv_bias, value_conv_scale,
                                 key_mask, cu_seqlens_q, cu_seqlens_k};
  const View query(host.place, q, "q");
  set_attention(p, host, query, View(host.place, k, "k"), View(host.place, v, "v"), left, right, outside, causal, qk,
                scale, rel_scale, dropout, options);
  set_threads(p);
  std::tuple<Tensor, Tensor> results = set_attention_results(p, host.place, q, query);
  check_status(ck::cpu::kernels().attention(p));
  return results;
}

TenTensors attention_grad(Tensor grad, Optional grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                          int64_t left, int64_t right, int64_t outside, bool causal, bool qk, double scale,
                          double rel_scale, double dropout, Optional seed, Optional bias, Optional query_rel,
                          Optional rel_query, Optional key_rel, Optional value_conv, Optional value_conv_bias,
                          Optional value_conv_scale, Optional key_mask, Optional cu_seqlens_q, Optional cu_seqlens_k,
                          int64_t needs) {
  ck::cpu::AttentionBackward p;
  Host host;
  const AttentionOptions options{seed,     bias,         query_rel,       rel_query,
                                 key_rel,  value_conv,   value_conv_bias, value_conv_scale,
                                 key_mask, cu_seqlens_q, cu_seqlens_k};
  set_attention(p, host, View(host.place, q, "q"), View(host.place, k, "k"), View(host.place, v, "v"), left, right,
                outside, causal, qk, scale, rel_scale, dropout, options);
  set_threads(p);
  TenTensors results = set_attention_gradients(p, host.place, grad, grad_lse, out, lse, q, k, v, options, needs);
  check_status(ck::cpu::kernels().attention_grad(p));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convkernels, CPU, m) {
  m.impl("tap_conv.cpu", TORCH_BOX(&tap_conv));
  m.impl("_tap_conv.cpu", TORCH_BOX(&tap_conv));
  m.impl("tap_grad.cpu", TORCH_BOX(&tap_grad));
  m.impl("_tap_grad.cpu", TORCH_BOX(&tap_grad));
  m.impl("tap_step.cpu", TORCH_BOX(&tap_step));
  m.impl("_tap_step.cpu", TORCH_BOX(&tap_step));
  m.impl("attention.cpu", TORCH_BOX(&attention));
  m.impl("_attention.cpu", TORCH_BOX(&attention));
  m.impl("attention_grad.cpu", TORCH_BOX(&attention_grad));
  m.impl("_attention_grad.cpu", TORCH_BOX(&attention_grad));
}
