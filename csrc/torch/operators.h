// The six operators: their signatures, the order of checks, allocation and computation, and their names. Each library
// makes them from a Target, of which every call constructs one:
//   Forward, Backward, Step, AttentionForward, AttentionBackward            the library's problems
//   Target(const Tensor& x, const char* argument);  Device device;          where the call computes
//   void set_seed(P&, const Tensor&);  void set_offsets(...);               see conv.h and attention.h
//   void forward(Forward&, bool per_batch);                                 they compute, or throw
//   void backward(Backward&, bool per_batch, const ConvGradTensors&);
//   void step(Step&, const Tensor& state);
//   void attention(AttentionForward&);  void attention_backward(AttentionBackward&);
// and exports convkernels_register, which Python calls with the namespace that it has defined the operators in: two
// copies of the package in one process have two.
// per_batch: weight has a batch dimension.
#pragma once

#include <memory>

#include "csrc/torch/attention.h"
#include "csrc/torch/conv.h"

namespace ck::binding {

template <class Target>
struct Operators {
  // What the operators of whole sequences begin with; compute(p, target, x, weight) is the rest.
  template <class P, class Compute>
  static auto of_sequences(const Tensor& x, const Tensor& weight, int64_t left, int64_t dilation, bool softmax,
                           bool renormalize, double dropout, const Optional& seed, const Optional& bias,
                           const Optional& gate, const Optional& mask, const Optional& cu_seqlens,
                           const Optional& initial_state, int64_t gate_activation, const Compute& compute) {
    P p;
    Target target(x, "x");
    Copies copies;
    const View input(target.device, x, "x"), filter(target.device, weight, "weight");
    set_problem(p, target, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
                initial_state, gate_activation, copies);
    if (bias) set_bias(p, target.device, *bias, copies);
    return compute(p, target, input, filter);
  }

  static Tensor tap_conv(Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax, bool renormalize,
                         double dropout, Optional seed, Optional bias, Optional gate, Optional mask,
                         Optional cu_seqlens, Optional initial_state, int64_t gate_activation, int64_t activation,
                         Optional out_gate, Optional residual) {
    return of_sequences<typename Target::Forward>(
        x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, initial_state,
        gate_activation, [&](auto& p, Target& target, const View& input, const View& filter) {
          p.finish = finish_of(target.device, activation, out_gate, residual, rows_as(input));
          Tensor y = allocate_like(target.device, x, input);
          p.y = rows_like(View(y), input, "y");
          if (p.batch * p.time * p.channels > 0) target.forward(p, filter.dim == 4);
          return y;
        });
  }

  // tap_conv of nothing but these: packed() in convkernels/ops/conv/schema.py says where each number lies.
  static Tensor plain_tap_conv(Tensor x, Tensor weight, int64_t settings) {
    return tap_conv(x, weight, settings >> 32, settings >> 1 & 0x7fffffff, settings & 1, false, 0.0, {}, {}, {}, {}, {},
                    {}, static_cast<int64_t>(Activation::kSigmoid), 0, {}, {});
  }

  // The gradients of the sum and of out_gate; the sum is computed again.
  static std::tuple<Tensor, Tensor> tap_activation_grad(Tensor grad, Tensor x, Tensor weight, int64_t left,
                                                        int64_t dilation, bool softmax, bool renormalize,
                                                        double dropout, Optional seed, Optional bias, Optional gate,
                                                        Optional mask, Optional cu_seqlens, Optional initial_state,
                                                        int64_t gate_activation, int64_t activation, Optional out_gate,
                                                        int64_t needs) {
    return of_sequences<typename Target::Forward>(
        x, weight, left, dilation, softmax, renormalize, dropout, seed, bias, gate, mask, cu_seqlens, initial_state,
        gate_activation, [&](auto& p, Target& target, const View& input, const View& filter) {
          p.finish = finish_of(target.device, activation, out_gate, {}, rows_as(input));
          p.finish.grad = rows_like(View(target.device, grad, "grad"), input, "grad");
          const Tensor none = allocate(target.device, {0}, input.type);
          Tensor of_sum = allocate_like(target.device, x, input), of_out_gate = none;
          p.y = rows_like(View(of_sum), input, "y");
          if ((needs & 2) != 0) {
            of_out_gate = allocate_like(target.device, x, input);
            p.finish.grad_out_gate = rows_like(View(of_out_gate), input, "grad_out_gate");
          }
          if (p.batch * p.time * p.channels > 0) target.forward(p, filter.dim == 4);
          return std::tuple<Tensor, Tensor>((needs & 1) != 0 ? of_sum : none, of_out_gate);
        });
  }

  static ConvGradTensors tap_grad(Tensor grad, Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax,
                                  bool renormalize, double dropout, Optional seed, Optional gate, Optional mask,
                                  Optional cu_seqlens, Optional initial_state, int64_t gate_activation, int64_t needs) {
    return of_sequences<typename Target::Backward>(
        x, weight, left, dilation, softmax, renormalize, dropout, seed, {}, gate, mask, cu_seqlens, initial_state,
        gate_activation, [&](auto& p, Target& target, const View& input, const View& filter) {
          ConvGradTensors results = set_gradients(p, target.device, grad, x, input, filter, gate, initial_state, needs);
          if (p.batch * p.time * p.channels > 0) target.backward(p, filter.dim == 4, results);
          return results;
        });
  }

  // Updates the state after the output has been computed.
  static Tensor tap_step(Tensor x, Tensor state, Tensor weight, int64_t dilation, bool softmax, bool renormalize,
                         Optional bias, Optional gate, Optional state_index, Optional position, int64_t gate_activation,
                         int64_t activation, Optional out_gate, Optional residual, Optional slots, Optional accepted,
                         Optional cu_seqlens, Optional save_at, Optional save_slots) {
    typename Target::Step p;
    Target target(x, "x");
    Copies copies;
    const View input(target.device, x, "x");
    set_step(p, target, input, View(target.device, weight, "weight"), dilation, softmax, renormalize, bias, gate,
             gate_activation, activation, out_gate, residual,
             {state, state_index, position, slots, accepted, cu_seqlens, save_at, save_slots}, copies);
    Tensor y = allocate_like(target.device, x, input);
    p.y = step_rows(View(y), input, "y");
    if (p.states.sequences * p.channels > 0) target.step(p, state);
    return y;
  }

  static std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, int64_t left, int64_t right,
                                              int64_t outside, bool causal, bool qk, double scale, double rel_scale,
                                              double dropout, Optional seed, Optional bias, Optional query_rel,
                                              Optional rel_query, Optional key_rel, Optional value_conv,
                                              Optional value_conv_bias, Optional value_conv_scale, Optional key_mask,
                                              Optional cu_seqlens_q, Optional cu_seqlens_k) {
    typename Target::AttentionForward p;
    Target target(q, "q");
    const AttentionOptions options{seed,     bias,         query_rel,       rel_query,
                                   key_rel,  value_conv,   value_conv_bias, value_conv_scale,
                                   key_mask, cu_seqlens_q, cu_seqlens_k};
    const View query(target.device, q, "q");
    set_attention(p, target, query, View(target.device, k, "k"), View(target.device, v, "v"), left, right, outside,
                  causal, qk, scale, rel_scale, dropout, options);
    std::tuple<Tensor, Tensor> results = set_attention_results(p, target.device, q, query);
    target.attention(p);
    return results;
  }

  static AttentionGradTensors attention_grad(Tensor grad, Optional grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k,
                                             Tensor v, int64_t left, int64_t right, int64_t outside, bool causal,
                                             bool qk, double scale, double rel_scale, double dropout, Optional seed,
                                             Optional bias, Optional query_rel, Optional rel_query, Optional key_rel,
                                             Optional value_conv, Optional value_conv_bias, Optional value_conv_scale,
                                             Optional key_mask, Optional cu_seqlens_q, Optional cu_seqlens_k,
                                             int64_t needs) {
    typename Target::AttentionBackward p;
    Target target(q, "q");
    const AttentionOptions options{seed,     bias,         query_rel,       rel_query,
                                   key_rel,  value_conv,   value_conv_bias, value_conv_scale,
                                   key_mask, cu_seqlens_q, cu_seqlens_k};
    set_attention(p, target, View(target.device, q, "q"), View(target.device, k, "k"), View(target.device, v, "v"),
                  left, right, outside, causal, qk, scale, rel_scale, dropout, options);
    AttentionGradTensors results =
        set_attention_gradients(p, target.device, grad, grad_lse, out, lse, q, k, v, options, needs);
    target.attention_backward(p);
    return results;
  }

  // What convkernels_register does: implements the operators of a namespace for a dispatch key, once in a process.
  // Returns nullptr, or why it cannot.
  static const char* register_once(const char* name_space, const char* key, const char* overload) {
    using torch::stable::detail::StableLibrary;
    static std::string failure;
    try {
      static const StableLibrary* const library = [&] {
        auto made = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, name_space, key, __FILE__, __LINE__);
        implement(*made, overload);
        return made.release();
      }();
      (void)library;
      return nullptr;
    } catch (const std::exception& error) {
      failure = error.what();
      return failure.c_str();
    }
  }

  // The overloads of this name ("cpu": tap_conv.cpu), also those without a derivative, whose names begin with "_".
  static void implement(torch::stable::detail::StableLibrary& library, const std::string& overload) {
    const auto add = [&](const char* name, auto* boxed) {
      for (const char* prefix : {"", "_"}) library.impl((std::string(prefix) + name + "." + overload).c_str(), boxed);
    };
    add("tap_conv", TORCH_BOX(&Operators::tap_conv));
    library.impl(("_plain_tap_conv." + overload).c_str(), TORCH_BOX(&Operators::plain_tap_conv));
    add("tap_activation_grad", TORCH_BOX(&Operators::tap_activation_grad));
    add("tap_grad", TORCH_BOX(&Operators::tap_grad));
    add("tap_step", TORCH_BOX(&Operators::tap_step));
    add("attention", TORCH_BOX(&Operators::attention));
    add("attention_grad", TORCH_BOX(&Operators::attention_grad));
  }
};

}  // namespace ck::binding
