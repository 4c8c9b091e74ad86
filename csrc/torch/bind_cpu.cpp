// The CPU operators, registered through torch's stable C interface: one binary for every torch from 2.10 on.
// Schemas, fakes and autograd live in convkernels/ops. Here tensors become pointers and strides, and whatever could
// make a kernel leave its memory is refused.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

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

Dtype float_dtype(ScalarType type, const char* argument) {
  switch (type) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: break;
  }
  throw std::runtime_error(std::string("argument '") + argument +
                           "': expected dtype float64, float32, bfloat16 or float16");
}

// What the stable interface tells about a tensor, asked once: every question is a call into torch.
struct View {
  explicit View(const Tensor& t)
      : data(t.mutable_data_ptr()),
        dim(t.dim()),
        size(t.sizes().data()),
        stride(t.strides().data()),
        type(t.scalar_type()) {}

  void* data;
  int64_t dim;
  const int64_t *size, *stride;
  ScalarType type;
};

// A [batch, time, channels] tensor of x's shape and dtype.
ck::cpu::Rows rows_like(const View& t, const View& x, const char* argument) {
  require(t.dim == 3 && t.type == x.type, argument, "three dimensions and the dtype of x");
  require(t.size[0] == x.size[0] && t.size[1] == x.size[1] && t.size[2] == x.size[2], argument, "the shape of x");
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// An uninitialised tensor. torch's own empty_like and new_empty look their operators up by name, which takes longer
// than everything else in a small call.
Tensor allocate(int64_t dim, const int64_t* size, const int64_t* stride, ScalarType type) {
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, size, stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  ck::poison(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
  return t;
}

Tensor allocate(std::initializer_list<int64_t> size, ScalarType type) {
  int64_t stride[4] = {1, 1, 1, 1};
  for (size_t i = size.size() - 1; i > 0; --i) stride[i - 1] = stride[i] * std::max<int64_t>(1, size.begin()[i]);
  return allocate(static_cast<int64_t>(size.size()), size.begin(), stride, type);
}

Tensor allocate_contiguous(const View& t) {
  std::vector<int64_t> stride(static_cast<size_t>(t.dim), 1);
  for (int64_t i = t.dim - 1; i > 0; --i) stride[i - 1] = stride[i] * std::max<int64_t>(1, t.size[i]);
  return allocate(t.dim, t.size, stride.data(), t.type);
}

// An uninitialised tensor in the layout of t if that is dense, as torch::empty_like chooses it.
Tensor allocate_like(const Tensor& tensor, const View& t) {
  // Dense in some order of the dimensions: each stride is the product of the sizes of those inside it.
  int64_t expected = 1;
  bool used[4] = {};
  for (int64_t i = 0; i < t.dim; ++i) used[i] = t.size[i] == 1;
  for (int64_t n = 0; n < t.dim; ++n) {
    int64_t next = -1;
    for (int64_t i = t.dim - 1; i >= 0 && next < 0; --i)
      if (!used[i] && t.stride[i] == expected && t.size[i] > 0) next = i;
    if (next < 0) break;
    used[next] = true;
    expected *= t.size[next];
  }
  bool dense = true;
  for (int64_t i = 0; i < t.dim; ++i) dense = dense && used[i];
  if (dense) return allocate(t.dim, t.size, t.stride, t.type);
  Tensor like = torch::stable::empty_like(tensor);
  ck::poison(like.mutable_data_ptr(), static_cast<size_t>(like.numel()) * like.element_size());
  return like;
}

void run_parallel(int64_t n, ck::cpu::ParallelBody body, void* context) {
  if (torch_parallel_for(0, n, 1, body, context) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("a worker thread failed (out of memory?)");
}

void check_status(const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string("convkernels cpu: ") + status);
}

// The dtype of weight or bias.
Dtype parameter_dtype(const View& t, Dtype x, const char* argument) {
  const Dtype dtype = float_dtype(t.type, argument);
  require((dtype == Dtype::kFloat64) == (x == Dtype::kFloat64), argument, "float64 if and only if x is float64");
  return dtype;
}

// A tensor's elements one after the other. A copy is kept where they do not lie so already.
class Contiguous {
 public:
  const void* data(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    copy_ = allocate_contiguous(View(t));
    torch::stable::copy_(*copy_, t);
    return copy_->const_data_ptr();
  }

 private:
  std::optional<Tensor> copy_;
};

// Owns what a Problem points to besides the tensors themselves.
struct Storage {
  std::vector<int64_t> offsets, state_rows;
  Contiguous state, bias;
};

void set_taps(ck::cpu::Problem& p, int64_t heads, int64_t taps, int64_t left, int64_t dilation) {
  p.heads = heads;
  require(heads > 0 && p.channels % heads == 0, "weight", "a number of heads that divides the channels");
  require(taps > 0, "weight", "at least one tap");
  require(dilation > 0, "dilation", "a positive number");
  p.taps = {taps, left, dilation};
  require(left >= 0 && left <= p.taps.span(), "left", "a number between 0 and dilation * (taps - 1)");
}

void set_bias(ck::cpu::Problem& p, const Tensor& bias, Storage& storage) {
  const View b(bias);
  require(b.dim == 1 && b.size[0] == p.channels, "bias", "[channels]");
  p.bias_dtype = parameter_dtype(b, p.dtype, "bias");
  p.bias = storage.bias.data(bias);
}

void set_mask(ck::cpu::Problem& p, const View& mask) {
  require(mask.dim == 2 && mask.type == ScalarType::Bool && mask.size[0] == p.batch && mask.size[1] == p.time, "mask",
          "bool [batch, time]");
  p.mask = static_cast<const bool*>(mask.data);
  p.mask_batch = mask.stride[0];
  p.mask_time = mask.stride[1];
}

void set_offsets(ck::cpu::Problem& p, const View& cu_seqlens, std::vector<int64_t>& offsets) {
  require(cu_seqlens.dim == 1 && cu_seqlens.size[0] >= 1, "cu_seqlens", "one dimension, at least one number");
  require(cu_seqlens.type == ScalarType::Int || cu_seqlens.type == ScalarType::Long, "cu_seqlens",
          "dtype int32 or int64");
  p.sequences = cu_seqlens.size[0] - 1;
  offsets.resize(static_cast<size_t>(p.sequences + 1));
  for (int64_t i = 0; i <= p.sequences; ++i) {
    const int64_t at = i * cu_seqlens.stride[0];
    offsets[static_cast<size_t>(i)] = cu_seqlens.type == ScalarType::Int
                                          ? static_cast<const int32_t*>(cu_seqlens.data)[at]
                                          : static_cast<const int64_t*>(cu_seqlens.data)[at];
  }
  require(offsets.front() == 0 && offsets.back() == p.time, "cu_seqlens", "offsets from 0 to the length of x");
  for (size_t i = 1; i < offsets.size(); ++i)
    require(offsets[i - 1] <= offsets[i], "cu_seqlens", "offsets that do not decrease");
  p.offsets = offsets.data();
}

// Fills what forward and backward have in common. Returns whether each batch row has filters of its own for all its
// positions (weight [batch, 1, heads, taps]).
bool set_problem(ck::cpu::Problem& p, const View& x, const View& weight, int64_t left, int64_t dilation, bool softmax,
                 bool renormalize, double dropout, const Optional& seed, const Optional& gate, const Optional& mask,
                 const Optional& cu_seqlens, const Optional& state, Storage& storage) {
  require(x.dim == 3, "x", "three dimensions [batch, time, channels]");
  p.dtype = float_dtype(x.type, "x");
  p.batch = x.size[0];
  p.time = x.size[1];
  p.channels = x.size[2];
  p.x = rows_like(x, x, "x");

  p.weight_dtype = p.bias_dtype = parameter_dtype(weight, p.dtype, "weight");
  const bool table = weight.dim == 2;
  require(table || weight.dim == 4, "weight", "two or four dimensions");
  const int64_t first = table ? 0 : 2;
  set_taps(p, weight.size[first], weight.size[first + 1], left, dilation);
  p.weight = weight.data;
  p.weight_head = weight.stride[first];
  p.weight_tap = weight.stride[first + 1];
  bool per_batch = false;
  if (!table) {
    require(weight.size[0] == p.batch, "weight", "the batch size of x in dimension 0");
    p.per_position = weight.size[1] == p.time;
    per_batch = !p.per_position;
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
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  if (gate) p.gate = rows_like(View(*gate), x, "gate");
  if (mask) set_mask(p, View(*mask));
  if (cu_seqlens) set_offsets(p, View(*cu_seqlens), storage.offsets);
  if (state) {
    const View s(*state);
    require(s.dim == 3 && s.type == x.type && s.size[0] == p.batch * p.sequences && s.size[1] == p.taps.span() &&
                s.size[2] == p.channels,
            "initial_state", "[sequences, dilation * (taps - 1), channels] of x's dtype");
    p.state = storage.state.data(*state);
  }
  p.parallel_for = run_parallel;
  p.threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return per_batch;
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
  Storage storage;
  const View input(x);
  const bool per_batch = set_problem(p, input, View(weight), left, dilation, softmax, renormalize, dropout, seed, gate,
                                     mask, cu_seqlens, initial_state, storage);
  if (bias) set_bias(p, *bias, storage);
  Tensor y = allocate_like(x, input);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tap_grad(Tensor grad, Tensor x, Tensor weight, int64_t left,
                                                            int64_t dilation, bool softmax, bool renormalize,
                                                            double dropout, Optional seed, Optional gate, Optional mask,
                                                            Optional cu_seqlens, Optional initial_state,
                                                            int64_t needs) {
  ck::cpu::Backward p;
  Storage storage;
  const View input(x), filter(weight);
  const bool per_batch = set_problem(p, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate, mask,
                                     cu_seqlens, initial_state, storage);
  p.grad = rows_like(View(grad), input, "grad");
  const auto wanted = [&](int64_t bit) { return (needs & bit) != 0; };
  const auto none = [](ScalarType type) { return allocate({0}, type); };
  const bool need_gate = wanted(8) && gate.has_value(), need_state = wanted(16) && initial_state.has_value();
  Tensor grad_x = wanted(1) ? allocate_like(x, input) : none(input.type);
  Tensor grad_weight = wanted(2) ? allocate_contiguous(filter) : none(filter.type);
  Tensor grad_bias = wanted(4) ? allocate({p.channels}, filter.type) : none(filter.type);
  Tensor grad_gate = need_gate ? allocate_like(*gate, View(*gate)) : none(input.type);
  Tensor grad_state = need_state ? allocate_contiguous(View(*initial_state)) : none(input.type);
  // States of empty sequences, whose gradient no piece of work would set.
  if (need_state) torch::stable::zero_(grad_state);
  for (const Tensor* t : {&grad_x, &grad_weight, &grad_gate})
    ck::prepare_output(t->mutable_data_ptr(), static_cast<size_t>(t->numel()) * t->element_size());

  if (wanted(1)) p.grad_x = rows_like(View(grad_x), input, "grad_x");
  if (need_gate) p.grad_gate = rows_like(View(grad_gate), input, "grad_gate");
  if (need_state && p.taps.span() > 0) p.grad_state = grad_state.mutable_data_ptr();
  if (p.batch * p.time * p.channels == 0) {  // nothing to sum
    if (wanted(2)) torch::stable::zero_(grad_weight);
    if (wanted(4)) torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_gate, grad_state};
  }
  if (wanted(2)) p.grad_weight = grad_weight.mutable_data_ptr();
  if (wanted(4)) p.grad_bias = grad_bias.mutable_data_ptr();
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
  return {grad_x, grad_weight, grad_bias, grad_gate, grad_state};
}

// One position: the window is the state and x. The state then moves up by one row.
Tensor tap_step(Tensor x, Tensor state, Tensor weight, int64_t dilation, bool softmax, bool renormalize, Optional bias,
                Optional gate, Optional state_index, Optional position) {
  ck::cpu::Forward p;
  Storage storage;
  const View input(x), filter(weight), rows(state);
  require(input.dim == 2, "x", "two dimensions [batch, channels]");
  const int64_t batch = p.batch = input.size[0], channels = p.channels = input.size[1];
  p.time = 1;
  p.dtype = float_dtype(input.type, "x");
  p.x = {input.data, input.stride[0], 0, input.stride[1]};

  require(filter.dim == 2 || filter.dim == 3, "weight", "[heads, taps] or [batch, heads, taps]");
  p.per_position = filter.dim == 3;
  require(!p.per_position || filter.size[0] == batch, "weight", "the batch size of x in dimension 0");
  p.weight_dtype = parameter_dtype(filter, p.dtype, "weight");
  const int64_t head = filter.dim - 2, taps = filter.size[head + 1];
  set_taps(p, filter.size[head], taps, dilation * (taps - 1), dilation);
  p.weight = filter.data;
  p.weight_batch = p.per_position ? filter.stride[0] : 0;
  p.weight_head = filter.stride[head];
  p.weight_tap = filter.stride[head + 1];
  p.softmax = softmax;
  p.renormalize = renormalize && softmax;

  const int64_t span = p.taps.span();
  require(rows.dim == 3 && rows.type == input.type && rows.size[0] == batch && rows.size[1] == span &&
              rows.size[2] == channels && state.is_contiguous(),
          "state", "contiguous [batch, dilation * (taps - 1), channels] of x's dtype");
  if (gate) {
    const View g(*gate);
    require(g.dim == 2 && g.type == input.type && g.size[0] == batch && g.size[1] == channels, "gate",
            "the shape and dtype of x");
    p.gate = {g.data, g.stride[0], 0, g.stride[1]};
  }
  if (bias) set_bias(p, *bias, storage);
  if (state_index) {
    const View index(*state_index);
    require(index.dim == 1 && index.type == ScalarType::Long && index.size[0] == batch, "state_index", "int64 [batch]");
    for (int64_t b = 0; b < batch; ++b) {
      storage.state_rows.push_back(static_cast<const int64_t*>(index.data)[b * index.stride[0]]);
      require(storage.state_rows.back() >= 0 && storage.state_rows.back() < batch, "state_index", "rows of state");
    }
    p.state_row = storage.state_rows.data();
  }
  if (position) {
    const View at(*position);
    require(at.dim == 1 && at.type == ScalarType::Long && (at.size[0] == batch || at.size[0] == 1), "position",
            "int64 [batch] or [1]");
    p.position = static_cast<const int64_t*>(at.data);
    p.position_stride = at.size[0] == 1 ? 0 : at.stride[0];
  }
  p.parallel_for = run_parallel;
  p.threads = static_cast<int64_t>(torch::stable::get_num_threads());

  Tensor y = allocate_like(x, input);
  if (batch * channels == 0) return y;
  const View output(y);
  p.y = {output.data, output.stride[0], 0, output.stride[1]};
  p.state = rows.data;
  // Rows of the state that another row continues from are needed until all have been written.
  std::optional<Tensor> old;
  if (state_index && span > 0) {
    old = allocate_contiguous(rows);
    torch::stable::copy_(*old, state);
    p.state = old->const_data_ptr();
  }
  check_status(ck::cpu::kernels().forward(p));
  if (span > 0) check_status(ck::cpu::kernels().shift_state(p, rows.data));
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
