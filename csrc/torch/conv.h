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

// A tensor like x, which is [batch, channels] or [batch, time, channels].
inline Rows step_rows(const View& t, const View& x, const char* argument) {
  if (x.dim == 3) return rows_like(t, x, argument);
  require(t.dim == 2 && t.type == x.type && t.size[0] == x.size[0] && t.size[1] == x.size[1], argument,
          "the shape and dtype of x");
  return {t.data, t.step(0), 0, t.stride[1]};
}

// int32 or int64 [count].
inline Indices indices_of(const Device& device, const Optional& t, int64_t count, const char* argument) {
  if (!t) return {};
  const View view(device, *t, argument);
  require(view.dim == 1 && view.size[0] == count && (view.type == ScalarType::Int || view.type == ScalarType::Long),
          argument, "int32 or int64, one per sequence (or state that is saved)");
  return {view.data, view.stride[0], view.type == ScalarType::Long};
}

// What a step takes besides the arguments of a convolution and of its result.
struct ServingTensors {
  const Tensor& state;
  const Optional &state_index, &position, &slots, &accepted, &cu_seqlens, &save_at, &save_slots;
};

// The states of a step, whose taps are known.
inline void set_states(States& s, const Convolution& p, const Device& device, const View& x, const ServingTensors& t) {
  s.sequences = t.cu_seqlens ? p.sequences : p.batch;
  const View state(device, t.state, "state");
  require(state.dim == 3 && state.type == x.type && (t.slots || state.size[0] == s.sequences) &&
              state.size[1] >= p.taps.span() && state.size[2] == p.channels,
          "state", "[sequences or slots, at least dilation * (taps - 1), channels] of x's dtype");
  require(has_own_memory(state), "state", "a tensor with every element in memory of its own");
  require(!t.state_index || !(t.slots || t.cu_seqlens), "state_index", "nothing with slots or cu_seqlens");
  s.pool = {state.data, state.step(0), state.step(1), state.stride[2]};
  s.slots = state.size[0];
  s.width = state.size[1];
  s.slot = indices_of(device, t.slots, s.sequences, "slots");
  s.source = indices_of(device, t.state_index, s.sequences, "state_index");
  s.accepted = indices_of(device, t.accepted, s.sequences, "accepted");
  if (t.position) {
    const View at(device, *t.position, "position");
    require(at.dim == 1 && at.type == ScalarType::Long && (at.size[0] == s.sequences || at.size[0] == 1), "position",
            "int64 [sequences] or [1]");
    // Otherwise rows of the state before the start of the sequence count as they are.
    if (p.renormalize) s.position = {at.data, at.size[0] == 1 ? 0 : at.stride[0], true};
  }
  if (t.save_at || t.save_slots) {
    require(t.save_at && t.save_slots && t.slots && t.cu_seqlens, "save_at", "save_slots, slots and cu_seqlens too");
    s.saves = t.save_at->dim() == 1 ? t.save_at->size(0) : 0;
    s.save_at = indices_of(device, t.save_at, s.saves, "save_at");
    s.save_slot = indices_of(device, t.save_slots, s.saves, "save_slots");
  }
}

// The next positions: the window is rows of the state and x. x is [batch, channels] or [batch, time, channels].
template <class P, class Target>
void set_step(P& p, Target& target, const View& x, const View& weight, int64_t dilation, bool softmax, bool renormalize,
              const Optional& bias, const Optional& gate, int64_t gate_activation, int64_t activation,
              const Optional& out_gate, const Optional& residual, const ServingTensors& serving, Copies& copies) {
  const Device& device = target.device;
  require(x.dim == 2 || x.dim == 3, "x", "[batch, channels] or [batch, time, channels]");
  const bool timed = x.dim == 3;
  p.batch = x.size[0];
  p.time = timed ? x.size[1] : 1;
  p.channels = x.size[x.dim - 1];
  p.dtype = float_dtype(x.type, "x");
  const auto rows_of = [&](const View& t, const char* argument) { return step_rows(t, x, argument); };
  p.x = rows_of(x, "x");

  require(weight.dim == 2 || weight.dim == x.dim + 1, "weight",
          timed ? "[heads, taps] or [batch, time, heads, taps]" : "[heads, taps] or [batch, heads, taps]");
  p.per_position = weight.dim > 2;
  require(!p.per_position || (weight.size[0] == p.batch && (!timed || weight.size[1] == p.time)), "weight",
          "the batch size and length of x in front");
  p.weight_dtype = parameter_dtype(weight, p.dtype, "weight");
  const int64_t head = weight.dim - 2, taps = weight.size[head + 1];
  set_taps(p, weight.size[head], taps, 0, dilation);
  p.taps.left = p.taps.span();
  p.weight = weight.data;
  p.weight_batch = p.per_position ? weight.stride[0] : 0;
  p.weight_time = p.per_position && timed ? weight.stride[1] : 0;
  p.weight_head = weight.stride[head];
  p.weight_tap = weight.stride[head + 1];
  p.softmax = softmax;
  p.renormalize = renormalize && softmax;

  if (serving.cu_seqlens) {
    require(timed && p.batch == 1, "x", "[1, time, channels], because cu_seqlens is given");
    const View offsets(device, *serving.cu_seqlens, "cu_seqlens");
    check_offsets(offsets);
    p.sequences = offsets.size[0] - 1;
    target.set_offsets(p, *serving.cu_seqlens, offsets);
  }
  set_states(p.states, p, device, x, serving);
  if (gate) p.gate = rows_of(View(device, *gate, "gate"), "gate");
  p.gate_activation = activation_of(gate_activation, "gate_activation");
  p.finish = finish_of(device, activation, out_gate, residual, rows_of);
  if (bias) set_bias(p, device, *bias, copies);
}

}  // namespace ck::binding
