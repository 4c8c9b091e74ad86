// The CPU operators, registered through torch's stable C interface: one binary for every torch from 2.10 on.
// Schemas, fakes and autograd live in convkernels/ops. Here tensors become pointers and strides, and whatever could
// make a kernel leave its memory is refused.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "csrc/cpu/dispatch.h"
#include "csrc/torch/memory.h"

namespace {

using ck::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void require(bool condition, const char* argument, const char* expected) {
  if (!condition) throw std::runtime_error(std::string("argument '") + argument + "': expected " + expected);
}

Dtype float_dtype(const Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: break;
  }
  throw std::runtime_error(std::string("argument '") + argument +
                           "': expected dtype float64, float32, bfloat16 or float16");
}

// A [batch, time, channels] tensor of x's shape and dtype.
ck::cpu::Rows rows_like(const Tensor& t, const Tensor& x, const char* argument) {
  require(t.dim() == 3 && t.scalar_type() == x.scalar_type(), argument, "three dimensions and the dtype of x");
  for (int64_t i = 0; i < 3; ++i) require(t.size(i) == x.size(i), argument, "the shape of x");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

void run_parallel(int64_t n, ck::cpu::ParallelBody body, void* context) {
  if (torch_parallel_for(0, n, 1, body, context) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("a worker thread failed (out of memory?)");
}

void check_status(const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string("convkernels cpu: ") + status);
}

// Fills what forward and backward have in common. Packed offsets of 32 bits are widened into `offsets`.
class Arguments {
 public:
  Arguments(ck::cpu::Problem& p, const Tensor& x, const Tensor& weight, int64_t left, int64_t dilation, bool softmax,
            bool renormalize, double dropout, const Optional& seed, const Optional& gate, const Optional& mask,
            const Optional& cu_seqlens, const Optional& state) {
    require(x.dim() == 3, "x", "three dimensions [batch, time, channels]");
    p.dtype = float_dtype(x, "x");
    p.batch = x.size(0);
    p.time = x.size(1);
    p.channels = x.size(2);
    p.x = rows_like(x, x, "x");

    p.weight_dtype = p.bias_dtype = float_dtype(weight, "weight");
    require((p.weight_dtype == Dtype::kFloat64) == (p.dtype == Dtype::kFloat64), "weight",
            "float64 if and only if x is float64");
    const bool table = weight.dim() == 2;
    require(table || weight.dim() == 4, "weight", "two or four dimensions");
    const int64_t first = table ? 0 : 2;
    p.heads = weight.size(first);
    p.taps = {weight.size(first + 1), left, dilation};
    require(p.heads > 0 && p.channels % p.heads == 0, "weight", "a number of heads that divides the channels");
    require(p.taps.taps > 0, "weight", "at least one tap");
    require(dilation > 0, "dilation", "a positive number");
    require(left >= 0 && left <= p.taps.span(), "left", "a number between 0 and dilation * (taps - 1)");
    p.weight = weight.const_data_ptr();
    p.weight_head = weight.stride(first);
    p.weight_tap = weight.stride(first + 1);
    if (!table) {
      require(weight.size(0) == p.batch, "weight", "the batch size of x in dimension 0");
      p.per_position = weight.size(1) == p.time && (p.time != 1 || weight.size(1) == 1);
      per_batch_ = !p.per_position;
      require(p.per_position || weight.size(1) == 1, "weight", "the length of x, or 1, in dimension 1");
      p.weight_batch = weight.stride(0);
      p.weight_time = p.per_position ? weight.stride(1) : 0;
    }
    p.softmax = softmax;
    p.renormalize = renormalize && softmax;
    require(dropout >= 0.0 && dropout <= 1.0, "dropout", "a probability");
    p.dropout = dropout;
    if (dropout > 0.0) {
      require(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed",
              "one int64 number if dropout > 0");
      p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    }
    if (gate) p.gate = rows_like(*gate, x, "gate");
    if (mask) {
      require(mask->dim() == 2 && mask->scalar_type() == ScalarType::Bool && mask->size(0) == p.batch &&
                  mask->size(1) == p.time,
              "mask", "bool [batch, time]");
      p.mask = static_cast<const bool*>(mask->const_data_ptr());
      p.mask_batch = mask->stride(0);
      p.mask_time = mask->stride(1);
    }
    if (cu_seqlens) set_offsets(p, *cu_seqlens);
    if (state) {
      require(state->dim() == 3 && state->scalar_type() == x.scalar_type() && state->size(0) == p.batch * p.sequences &&
                  state->size(1) == p.taps.span() && state->size(2) == p.channels,
              "initial_state", "[sequences, dilation * (taps - 1), channels] of x's dtype");
      state_ = state->is_contiguous() ? *state : contiguous(*state);
      p.state = state_.const_data_ptr();
    }
    p.parallel_for = run_parallel;
    p.threads = static_cast<int64_t>(torch::stable::get_num_threads());
  }

  // Calls run(p) once, or once for every batch row if each has filters of its own for all its positions.
  template <class P, class Run>
  void each(const P& p, int64_t element_size, const Run& run) const {
    if (!per_batch_) return run(p);
    const int64_t weight_size = ck::size_of(p.weight_dtype);
    for (int64_t b = 0; b < p.batch; ++b) {
      P row = p;
      const auto move = [&](auto*& pointer, int64_t bytes) {
        if (pointer != nullptr)
          pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(pointer) +
                                                                                 b * bytes);
      };
      row.batch = 1;
      row.dropout_batch = b;
      move(row.x.data, p.x.batch * element_size);
      move(row.gate.data, p.gate.batch * element_size);
      move(row.mask, p.mask_batch);
      move(row.weight, p.weight_batch * weight_size);
      const int64_t state_bytes = p.sequences * p.taps.span() * p.channels * element_size;
      move(row.state, state_bytes);
      if constexpr (std::is_same_v<P, ck::cpu::Forward>) {
        move(row.y.data, p.y.batch * element_size);
      } else {
        move(row.grad.data, p.grad.batch * element_size);
        move(row.grad_x.data, p.grad_x.batch * element_size);
        move(row.grad_gate.data, p.grad_gate.batch * element_size);
        move(row.grad_weight, p.heads * p.taps.taps * weight_size);
        move(row.grad_state, state_bytes);
      }
      run(row);
    }
  }

  bool per_batch() const { return per_batch_; }

 private:
  static Tensor contiguous(const Tensor& t) {
    Tensor copy = torch::stable::new_empty(t, t.sizes());
    return torch::stable::copy_(copy, t);
  }

  void set_offsets(ck::cpu::Problem& p, const Tensor& cu_seqlens) {
    require(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, "cu_seqlens", "one dimension, at least one number");
    p.sequences = cu_seqlens.numel() - 1;
    const int64_t stride = cu_seqlens.stride(0);
    offsets_.resize(static_cast<size_t>(p.sequences + 1));
    for (int64_t i = 0; i <= p.sequences; ++i) {
      if (cu_seqlens.scalar_type() == ScalarType::Int)
        offsets_[i] = static_cast<const int32_t*>(cu_seqlens.const_data_ptr())[i * stride];
      else if (cu_seqlens.scalar_type() == ScalarType::Long)
        offsets_[i] = static_cast<const int64_t*>(cu_seqlens.const_data_ptr())[i * stride];
      else
        require(false, "cu_seqlens", "dtype int32 or int64");
    }
    require(offsets_.front() == 0 && offsets_.back() == p.time, "cu_seqlens", "offsets from 0 to the length of x");
    for (int64_t i = 0; i < p.sequences; ++i)
      require(offsets_[i] <= offsets_[i + 1], "cu_seqlens", "offsets that do not decrease");
    p.offsets = offsets_.data();
  }

  bool per_batch_ = false;
  std::vector<int64_t> offsets_;
  Tensor state_;
};

Tensor tap_conv(Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax, bool renormalize, double dropout,
                Optional seed, Optional bias, Optional gate, Optional mask, Optional cu_seqlens,
                Optional initial_state) {
  ck::cpu::Forward p;
  const Arguments arguments(p, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
                            initial_state);
  Tensor bias_row;
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == p.channels, "bias", "[channels]");
    p.bias_dtype = float_dtype(*bias, "bias");
    require((p.bias_dtype == Dtype::kFloat64) == (p.dtype == Dtype::kFloat64), "bias",
            "float64 if and only if x is float64");
    bias_row = *bias;
    if (!bias->is_contiguous()) {
      bias_row = torch::stable::new_empty(*bias, bias->sizes());
      torch::stable::copy_(bias_row, *bias);
    }
    p.bias = bias_row.const_data_ptr();
  }
  Tensor y = torch::stable::empty_like(x);
  p.y = rows_like(y, x, "y");
  const int64_t size = static_cast<int64_t>(x.element_size());
  p.resident_output = ck::prepare_output(p.y.data, static_cast<size_t>(y.numel() * size));
  arguments.each(p, size, [](const ck::cpu::Forward& q) { check_status(ck::cpu::kernels().forward(q)); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tap_grad(Tensor grad, Tensor x, Tensor weight, int64_t left,
                                                            int64_t dilation, bool softmax, bool renormalize,
                                                            double dropout, Optional seed, Optional gate, Optional mask,
                                                            Optional cu_seqlens, Optional initial_state,
                                                            int64_t needs) {
  ck::cpu::Backward p;
  const Arguments arguments(p, x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
                            initial_state);
  p.grad = rows_like(grad, x, "grad");
  const int64_t size = static_cast<int64_t>(x.element_size());
  const auto large = [&](Tensor t) {
    ck::prepare_output(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
    return t;
  };
  const auto none = [](const Tensor& t) { return torch::stable::new_empty(t, {0}); };
  Tensor grad_x = needs & 1 ? large(torch::stable::empty_like(x)) : none(x);
  Tensor grad_weight = needs & 2 ? large(torch::stable::new_empty(weight, weight.sizes())) : none(weight);
  Tensor grad_bias = needs & 4 ? torch::stable::new_empty(weight, {p.channels}) : none(weight);
  Tensor grad_gate = needs & 8 && gate ? large(torch::stable::empty_like(*gate)) : none(x);
  Tensor grad_state = needs & 16 && initial_state ? torch::stable::new_zeros(x, initial_state->sizes()) : none(x);
  if (needs & 1) p.grad_x = rows_like(grad_x, x, "grad_x");
  if (needs & 8 && gate) p.grad_gate = rows_like(grad_gate, x, "grad_gate");
  if (needs & 16 && initial_state && p.taps.span() > 0) p.grad_state = grad_state.mutable_data_ptr();
  if (p.batch * p.time * p.channels == 0) {  // nothing to sum
    if (needs & 2) torch::stable::zero_(grad_weight);
    if (needs & 4) torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_gate, grad_state};
  }
  if (needs & 2) p.grad_weight = grad_weight.mutable_data_ptr();
  if (needs & 4) p.grad_bias = grad_bias.mutable_data_ptr();
  if (arguments.per_batch() && p.grad_bias != nullptr) {  // the one gradient that is a sum over batch rows
    ck::cpu::Backward bias = p;
    bias.grad_x = bias.grad_gate = {};
    bias.grad_weight = bias.grad_state = nullptr;
    check_status(ck::cpu::kernels().backward(bias));
    p.grad_bias = nullptr;
  }
  arguments.each(p, size, [](const ck::cpu::Backward& q) { check_status(ck::cpu::kernels().backward(q)); });
  return {grad_x, grad_weight, grad_bias, grad_gate, grad_state};
}

// One position: the window is the state and x. The state then moves up by one row.
Tensor tap_step(Tensor x, Tensor state, Tensor weight, int64_t dilation, bool softmax, bool renormalize, Optional bias,
                Optional gate, Optional state_index, Optional position) {
  require(x.dim() == 2, "x", "two dimensions [batch, channels]");
  require(weight.dim() == 2 || weight.dim() == 3, "weight", "[heads, taps] or [batch, heads, taps]");
  require(state.dim() == 3 && state.is_contiguous() && state.scalar_type() == x.scalar_type(), "state",
          "contiguous [batch, dilation * (taps - 1), channels] of x's dtype");
  const int64_t batch = x.size(0), channels = x.size(1), last = weight.dim() - 1;
  ck::cpu::Forward p;
  p.batch = batch;
  p.time = 1;
  p.channels = channels;
  p.dtype = float_dtype(x, "x");
  p.weight_dtype = float_dtype(weight, "weight");
  p.heads = weight.size(last - 1);
  require(dilation > 0, "dilation", "a positive number");
  p.taps = {weight.size(last), dilation * (weight.size(last) - 1), dilation};
  require(p.taps.taps > 0, "weight", "at least one tap");
  require(p.heads > 0 && channels % p.heads == 0, "weight", "a number of heads that divides the channels");
  require((p.weight_dtype == Dtype::kFloat64) == (p.dtype == Dtype::kFloat64), "weight",
          "float64 if and only if x is float64");
  require(last == 1 || weight.size(0) == batch, "weight", "the batch size of x in dimension 0");
  const int64_t span = p.taps.span();
  require(state.size(0) == batch && state.size(1) == span && state.size(2) == channels, "state",
          "[batch, dilation * (taps - 1), channels]");
  p.weight = weight.const_data_ptr();
  p.weight_head = weight.stride(last - 1);
  p.weight_tap = weight.stride(last);
  p.weight_batch = last == 2 ? weight.stride(0) : 0;
  p.per_position = last == 2;
  p.softmax = softmax;
  p.renormalize = renormalize && softmax;
  p.x = {const_cast<void*>(x.const_data_ptr()), x.stride(0), 0, x.stride(1)};
  if (gate) {
    require(gate->dim() == 2 && gate->size(0) == batch && gate->size(1) == channels &&
                gate->scalar_type() == x.scalar_type(),
            "gate", "the shape and dtype of x");
    p.gate = {const_cast<void*>(gate->const_data_ptr()), gate->stride(0), 0, gate->stride(1)};
  }
  Tensor bias_row;
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == channels, "bias", "[channels]");
    p.bias_dtype = float_dtype(*bias, "bias");
    require((p.bias_dtype == Dtype::kFloat64) == (p.dtype == Dtype::kFloat64), "bias",
            "float64 if and only if x is float64");
    bias_row = *bias;
    if (!bias->is_contiguous()) {
      bias_row = torch::stable::new_empty(*bias, bias->sizes());
      torch::stable::copy_(bias_row, *bias);
    }
    p.bias = bias_row.const_data_ptr();
  }
  std::vector<int64_t> rows;
  if (state_index) {
    require(state_index->dim() == 1 && state_index->size(0) == batch && state_index->scalar_type() == ScalarType::Long,
            "state_index", "int64 [batch]");
    const auto* index = static_cast<const int64_t*>(state_index->const_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      rows.push_back(index[b * state_index->stride(0)]);
      require(rows.back() >= 0 && rows.back() < batch, "state_index", "rows of state");
    }
    p.state_row = rows.data();
  }
  if (position) {
    require(position->dim() == 1 && (position->size(0) == batch || position->size(0) == 1) &&
                position->scalar_type() == ScalarType::Long,
            "position", "int64 [batch] or [1]");
    p.position = static_cast<const int64_t*>(position->const_data_ptr());
    p.position_stride = position->size(0) == 1 ? 0 : position->stride(0);
  }
  p.parallel_for = run_parallel;
  p.threads = static_cast<int64_t>(torch::stable::get_num_threads());

  Tensor y = torch::stable::empty_like(x);
  if (batch * channels == 0) return y;
  p.y = {y.mutable_data_ptr(), y.stride(0), 0, y.stride(1)};
  // Rows of the state that another row continues from are needed until all have been written.
  Tensor old = state;
  if (state_index && span > 0) {
    old = torch::stable::new_empty(state, state.sizes());
    torch::stable::copy_(old, state);
  }
  p.state = old.const_data_ptr();
  check_status(ck::cpu::kernels().forward(p));
  if (span > 0) check_status(ck::cpu::kernels().shift_state(p, state.mutable_data_ptr()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convkernels, CPU, m) {
  m.impl("tap_conv.cpu", TORCH_BOX(&tap_conv));
  m.impl("_tap_conv.cpu", TORCH_BOX(&tap_conv));
  m.impl("tap_grad.cpu", TORCH_BOX(&tap_grad));
  m.impl("_tap_grad.cpu", TORCH_BOX(&tap_grad));
  m.impl("tap_step.cpu", TORCH_BOX(&tap_step));
  m.impl("_tap_step.cpu", TORCH_BOX(&tap_step));
}
