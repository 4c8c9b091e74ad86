// The CPU operators, registered through torch's stable C interface: one binary for every torch from 2.10 on.
#include <type_traits>

#include "csrc/cpu/dispatch.h"
#include "csrc/torch/operators.h"

namespace {

using namespace ck::binding;
using ck::cpu::kernels;

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
  if constexpr (std::is_same_v<P, ck::cpu::ConvForward>) {
    for (const auto member :
         {&ck::Finish::out_gate, &ck::Finish::residual, &ck::Finish::grad, &ck::Finish::grad_out_gate})
      move((row.finish.*member).data, (p.finish.*member).batch * size);
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

void check_indices(const ck::Indices& indices, int64_t count, int64_t least, int64_t most, const char* argument,
                   const char* expected) {
  if (indices.data == nullptr) return;
  for (int64_t i = 0; i < count; ++i) require(indices[i] >= least && indices[i] <= most, argument, expected);
}

// Offsets, seeds and indices are read on the host.
struct Cpu {
  using Forward = ck::cpu::ConvForward;
  using Backward = ck::cpu::ConvBackward;
  using Step = ck::cpu::ConvStep;
  using AttentionForward = ck::cpu::AttentionForward;
  using AttentionBackward = ck::cpu::AttentionBackward;

  Cpu(const Tensor&, const char*) {}

  template <class P>
  void set_seed(P& p, const Tensor& seed) const {
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  }

  void set_offsets(ck::cpu::ConvProblem& p, const Tensor&, const View& cu_seqlens) {
    offsets = read_offsets(cu_seqlens, p.time, "cu_seqlens");
    p.offsets = offsets.data();
  }

  void set_offsets(ck::cpu::AttentionProblem& p, const Tensor& of_queries, const Tensor& of_keys) {
    offsets = read_offsets(View(of_queries), p.queries, "cu_seqlens_q");
    key_offsets = read_offsets(View(of_keys), p.keys, "cu_seqlens_k");
    p.query_offsets = offsets.data();
    p.key_offsets = key_offsets.data();
  }

  void forward(Forward& p, bool per_batch) const {
    set_threads(p);
    const auto bytes = static_cast<size_t>(p.batch * p.time * p.channels * ck::size_of(p.dtype));
    if (p.finish.grad_out_gate.data != nullptr) ck::prepare_output(p.finish.grad_out_gate.data, bytes);
    p.resident_output = ck::prepare_output(p.y.data, bytes);
    if (!per_batch || p.per_position) return check_status(kernels().conv_forward(p));
    for (int64_t b = 0; b < p.batch; ++b) check_status(kernels().conv_forward(batch_row(p, b)));
  }

  void backward(Backward& p, bool per_batch, const ConvGradTensors& results) const {
    set_threads(p);
    for (const Tensor* t : {&std::get<0>(results), &std::get<1>(results), &std::get<3>(results)})
      ck::prepare_output(t->mutable_data_ptr(), static_cast<size_t>(t->numel()) * t->element_size());
    if (!per_batch || p.per_position) return check_status(kernels().conv_backward(p));
    if (p.grad_bias != nullptr) {  // the one gradient that is a sum over batch rows
      Backward bias = p;
      bias.grad_x = bias.grad_gate = {};
      bias.grad_weight = bias.grad_state = nullptr;
      check_status(kernels().conv_backward(bias));
      p.grad_bias = nullptr;
    }
    for (int64_t b = 0; b < p.batch; ++b) check_status(kernels().conv_backward(batch_row(p, b)));
  }

  void step(Step& p, const Tensor& state) const {
    set_threads(p);
    const ck::States& states = p.states;
    check_indices(states.slot, states.sequences, INT64_MIN, states.slots - 1, "slots", "slots of the state");
    check_indices(states.save_at, states.saves, 1, p.time, "save_at", "positions from 1 to the length of x");
    check_indices(states.save_slot, states.saves, INT64_MIN, states.slots - 1, "save_slots", "slots of the state");
    check_indices(states.source, states.sequences, 0, states.slots - 1, "state_index", "rows of the state");
    for (int64_t i = 0; i < states.sequences && states.accepted.data != nullptr; ++i) {
      if (states.slot.get(i, i) < 0) continue;
      const int64_t length = p.offsets != nullptr ? p.offsets[i + 1] - p.offsets[i] : p.time,
                    taken = states.accepted[i];
      require(taken <= length && taken >= p.taps.span() - states.row(length, 0), "accepted",
              "numbers of rows that the state holds");
    }
    p.old = states.pool;
    // Rows of the state that another row continues from are needed until all have been written.
    std::optional<Tensor> copy;
    if (states.source.data != nullptr && states.width > 0) {
      copy = allocate_contiguous(device, View(state));
      torch::stable::copy_(*copy, state);
      const View view(*copy);
      p.old = rows_like(view, view, "state");
    }
    check_status(kernels().conv_step(p));
  }

  void attention(AttentionForward& p) const {
    set_threads(p);
    check_status(kernels().attention_forward(p));
  }

  void attention_backward(AttentionBackward& p) const {
    set_threads(p);
    check_status(kernels().attention_backward(p));
  }

  Device device;
  std::vector<int64_t> offsets, key_offsets;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* convkernels_register(const char* name_space) {
  return Operators<Cpu>::register_once(name_space, "CPU", "cpu");
}
