// The arguments of tap_conv, its gradients and tap_step as a ck::Convolution. Schemas, fakes and autograd live in
// convkernels/ops; here whatever could make a kernel leave its memory is refused.
//
// Of a library's Target (operators.h) this uses the device of results, and how offsets and seeds are read:
//   Device device;  void set_seed(P&, const Tensor&);  void set_offsets(P&, const Tensor& cu_seqlens, const View&);
#pragma once

#include <tuple>

#include "csrc/torch/tensors.h"

namespace ck::binding {

// What a call points to besides the tensors themselves.
struct Copies {
  Contiguous state, bias;
};

// The dtype of weight or bias.
inline Dtype parameter_dtype(const View& t, Dtype x, const char* argument) {
  const Dtype dtype = float_dtype(t.type, argument);
  require((dtype == Dtype::kFloat64) == (x == Dtype::kFloat64), argument, "float64 if and only if x is float64");
  return dtype;
}

inline void set_taps(Convolution& p, int64_t heads, int64_t taps, int64_t left, int64_t dilation) {
  p.heads = heads;
  require(heads > 0 && p.channels % heads == 0, "weight", "a number of heads that divides the channels");
  require(taps > 0, "weight", "at least one tap");
  require(dilation > 0 && dilation <= kFarthest && taps - 1 <= kFarthest / dilation, "dilation",
          "a positive number, at most 2^30, also times taps - 1");
  p.taps = {taps, left, dilation};
  require(left >= 0 && left <= p.taps.span(), "left", "a number between 0 and dilation * (taps - 1)");
}

inline void set_bias(Convolution& p, const Device& device, const Tensor& bias, Copies& copies) {
  const View b(device, bias, "bias");
  require(b.dim == 1 && b.size[0] == p.channels, "bias", "[channels]");
  p.bias_dtype = parameter_dtype(b, p.dtype, "bias");
  p.bias = copies.bias.data(device, bias);
}

inline void set_mask(Convolution& p, const View& mask) {
  require(mask.dim == 2 && mask.type == ScalarType::Bool && mask.size[0] == p.batch && mask.size[1] == p.time, "mask",
          "bool [batch, time]");
  p.mask = static_cast<const bool*>(mask.data);
  p.mask_batch = mask.stride[0];
  p.mask_time = mask.stride[1];
}

inline Activation activation_of(int64_t number, const char* argument) {
  require(number >= 0 && number <= static_cast<int64_t>(Activation::kSilu), argument, "0, 1 or 2");
  return static_cast<Activation>(number);
}

// Makes Rows of tensors that have the shape of x.
inline auto rows_as(const View& x) {
  return [&x](const View& t, const char* argument) { return rows_like(t, x, argument); };
}

// What follows the sums of a forward pass; tensors have the shape of x, of which rows_of makes Rows.
template <class RowsOf>
Finish finish_of(const Device& device, int64_t activation, const Optional& out_gate, const Optional& residual,
                 const RowsOf& rows_of) {
  Finish finish;
  finish.activation = activation_of(activation, "activation");
  if (out_gate) finish.out_gate = rows_of(View(device, *out_gate, "out_gate"), "out_gate");
  if (residual) finish.residual = rows_of(View(device, *residual, "residual"), "residual");
  return finish;
}

inline void check_offsets(const View& cu_seqlens) {
  require(cu_seqlens.dim == 1 && cu_seqlens.size[0] >= 1, "cu_seqlens", "one dimension, at least one number");
  require(cu_seqlens.type == ScalarType::Int || cu_seqlens.type == ScalarType::Long, "cu_seqlens",
          "dtype int32 or int64");
}

// Fills what forward and backward have in common.
template <class P, class Target>
void set_problem(P& p, Target& target, const View& x, const View& weight, int64_t left, int64_t dilation, bool softmax,
                 bool renormalize, double dropout, const Optional& seed, const Optional& gate, const Optional& mask,
                 const Optional& cu_seqlens, const Optional& state, int64_t gate_activation, Copies& copies) {
  require(x.dim == 3, "x", "three dimensions [batch, time, channels]");
  p.dtype = float_dtype(x.type, "x");
  p.batch = x.size[0];
  p.time = x.size[1];
  p.channels = x.size[2];
  p.x = rows_like(x, x, "x");

  p.weight_dtype = parameter_dtype(weight, p.dtype, "weight");
  const bool table = weight.dim == 2;
  require(table || weight.dim == 4, "weight", "two or four dimensions");
  const int64_t first = table ? 0 : 2;
  set_taps(p, weight.size[first], weight.size[first + 1], left, dilation);
  p.weight = weight.data;
  p.weight_head = weight.stride[first];
  p.weight_tap = weight.stride[first + 1];
  if (!table) {
    require(weight.size[0] == p.batch, "weight", "the batch size of x in dimension 0");
    p.per_position = weight.size[1] == p.time;
    require(p.per_position || weight.size[1] == 1, "weight", "the length of x, or 1, in dimension 1");
    p.weight_batch = weight.stride[0];
    p.weight_time = p.per_position ? weight.stride[1] : 0;
  }
  p.softmax = softmax;
  p.renormalize = renormalize && softmax;
  require(dropout >= 0.0 && dropout <= 1.0, "dropout", "a probability");
  p.dropout = dropout;
  if (dropout > 0.0) {
    require(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed",
            "one int64 number if dropout > 0");
    target.set_seed(p, checked(target.device, *seed, "seed"));
  }
  if (gate) p.gate = rows_like(View(target.device, *gate, "gate"), x, "gate");
  p.gate_activation = activation_of(gate_activation, "gate_activation");
  if (mask) set_mask(p, View(target.device, *mask, "mask"));
  if (cu_seqlens) {
    const View offsets(target.device, *cu_seqlens, "cu_seqlens");
    check_offsets(offsets);
    p.sequences = offsets.size[0] - 1;
    target.set_offsets(p, *cu_seqlens, offsets);
  }
  if (state) {
    const View s(target.device, *state, "initial_state");
    require(s.dim == 3 && s.type == x.type && s.size[0] == p.batch * p.sequences && s.size[1] == p.taps.span() &&
                s.size[2] == p.channels,
            "initial_state", "[sequences, dilation * (taps - 1), channels] of x's dtype");
    p.state = copies.state.data(target.device, *state);
  }
}

using ConvGradTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The bits of tap_grad's `needs`, in the order of its results.
enum ConvNeed : int64_t { kNeedX = 1, kNeedWeight = 2, kNeedBias = 4, kNeedGate = 8, kNeedState = 16 };

// Allocates the gradients that `needs` asks for, and enters them into p.
template <class P>
ConvGradTensors set_gradients(P& p, const Device& device, const Tensor& grad, const Tensor& x, const View& input,
                              const View& weight, const Optional& gate, const Optional& state, int64_t needs) {
  p.grad = rows_like(View(device, grad, "grad"), input, "grad");
  const auto wanted = [&](ConvNeed bit) { return (needs & bit) != 0; };
  const auto none = [&](ScalarType type) { return allocate(device, {0}, type); };
  const bool need_gate = wanted(kNeedGate) && gate.has_value(), need_state = wanted(kNeedState) && state.has_value();
  Tensor grad_x = wanted(kNeedX) ? allocate_like(device, x, input) : none(input.type);
  Tensor grad_weight = wanted(kNeedWeight) ? allocate_contiguous(device, weight) : none(weight.type);
  // The dtype of the bias, which is not given, is the caller's business: here the sum is not rounded.
  p.bias_dtype = p.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const ScalarType sum_type = p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor grad_bias = allocate(device, {wanted(kNeedBias) ? p.channels : 0}, sum_type);
  Tensor grad_gate = need_gate ? allocate_like(device, *gate, View(*gate)) : none(input.type);
  Tensor grad_state = need_state ? allocate_contiguous(device, View(*state)) : none(input.type);
  // States of empty sequences, whose gradient no piece of work would set.
  if (need_state) torch::stable::zero_(grad_state);
  if (wanted(kNeedX)) p.grad_x = rows_like(View(grad_x), input, "grad_x");
  if (need_gate) p.grad_gate = rows_like(View(grad_gate), input, "grad_gate");
  if (need_state && p.taps.span() > 0) p.grad_state = grad_state.mutable_data_ptr();
  if (p.batch * p.time * p.channels == 0) {  // nothing to sum
    if (wanted(kNeedWeight)) torch::stable::zero_(grad_weight);
    if (wanted(kNeedBias)) torch::stable::zero_(grad_bias);
  } else {
    if (wanted(kNeedWeight)) p.grad_weight = grad_weight.mutable_data_ptr();
    if (wanted(kNeedBias)) p.grad_bias = grad_bias.mutable_data_ptr();
  }
  return {grad_x, grad_weight, grad_bias, grad_gate, grad_state};
}

// One position: the window is the state and x.
template <class P>
void set_step(P& p, const Device& device, const View& x, const Tensor& state, const View& weight, int64_t dilation,
              bool softmax, bool renormalize, const Optional& bias, const Optional& gate, const Optional& state_index,
              const Optional& position, int64_t gate_activation, int64_t activation, const Optional& out_gate,
              const Optional& residual, Copies& copies) {
  require(x.dim == 2, "x", "two dimensions [batch, channels]");
  p.batch = x.size[0];
  p.channels = x.size[1];
  p.time = 1;
  p.dtype = float_dtype(x.type, "x");
  p.x = {x.data, x.stride[0], 0, x.stride[1]};

  require(weight.dim == 2 || weight.dim == 3, "weight", "[heads, taps] or [batch, heads, taps]");
  p.per_position = weight.dim == 3;
  require(!p.per_position || weight.size[0] == p.batch, "weight", "the batch size of x in dimension 0");
  p.weight_dtype = parameter_dtype(weight, p.dtype, "weight");
  const int64_t head = weight.dim - 2, taps = weight.size[head + 1];
  set_taps(p, weight.size[head], taps, 0, dilation);
  p.taps.left = p.taps.span();
  p.weight = weight.data;
  p.weight_batch = p.per_position ? weight.stride[0] : 0;
  p.weight_head = weight.stride[head];
  p.weight_tap = weight.stride[head + 1];
  p.softmax = softmax;
  p.renormalize = renormalize && softmax;

  const View rows(device, state, "state");
  require(rows.dim == 3 && rows.type == x.type && rows.size[0] == p.batch && rows.size[1] == p.taps.span() &&
              rows.size[2] == p.channels && state.is_contiguous(),
          "state", "contiguous [batch, dilation * (taps - 1), channels] of x's dtype");
  p.state = rows.data;
  const auto rows_of = [&](const View& t, const char* argument) -> Rows {
    require(t.dim == 2 && t.type == x.type && t.size[0] == p.batch && t.size[1] == p.channels, argument,
            "the shape and dtype of x");
    return {t.data, t.stride[0], 0, t.stride[1]};
  };
  if (gate) p.gate = rows_of(View(device, *gate, "gate"), "gate");
  p.gate_activation = activation_of(gate_activation, "gate_activation");
  p.finish = finish_of(device, activation, out_gate, residual, rows_of);
  if (bias) set_bias(p, device, *bias, copies);
  if (state_index) {
    const View index(device, *state_index, "state_index");
    require(index.dim == 1 && index.type == ScalarType::Long && index.size[0] == p.batch, "state_index",
            "int64 [batch]");
  }
  if (position) {
    const View at(device, *position, "position");
    require(at.dim == 1 && at.type == ScalarType::Long && (at.size[0] == p.batch || at.size[0] == 1), "position",
            "int64 [batch] or [1]");
    // Otherwise rows of the state before the start of the sequence count as they are.
    if (p.renormalize) {
      p.position = static_cast<const int64_t*>(at.data);
      p.position_stride = at.size[0] == 1 ? 0 : at.stride[0];
    }
  }
}

}  // namespace ck::binding
