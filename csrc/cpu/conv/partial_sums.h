// Sums over positions, of which every split of the rows leaves a part: gradients of filters that positions share, and
// of the bias.
#pragma once

#include "csrc/cpu/conv/forward.h"

namespace ck::cpu::CK_ISA {

// The partial sums of each split of the rows.
template <class C>
struct PartialSums {
  int64_t filter_size, bias_size;
  Scratch<C> filters, bias;

  PartialSums(int64_t splits, int64_t filter, int64_t channels)
      : filter_size(filter), bias_size(channels), filters(splits * filter), bias(splits * channels) {}
};

// Adds the partial sums in order and applies the derivative of the softmax.
template <class T>
inline void reduce_filters(const ConvBackward& p, const ChannelPlan& plan, const PartialSums<Compute<T>>& sums,
                           int64_t splits, const SharedFilters<T>* shared) {
  using C = Compute<T>;
  constexpr int V = kLanes<C>;
  const int64_t K = p.taps.taps, pitch = shared_pitch(p), per_head = p.channels / p.heads;
  Scratch<C> total(K * pitch);
  memset(static_cast<void*>(total.get()), 0, static_cast<size_t>(K * pitch) * sizeof(C));
  const bool threads = splits * sums.filter_size >= kSerialWork;
  if (shared == nullptr) {  // d(logits) already, [heads][taps]
    for (int64_t g = 0; g < splits; ++g)
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t k = 0; k < K; ++k) total[k * pitch + h] += sums.filters[g * sums.filter_size + h * K + k];
    with_dtype(p.weight_dtype, [&](auto* tag) {
      auto* to = static_cast<decltype(tag)>(p.grad_weight);
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t k = 0; k < K; ++k) from_float(total[k * pitch + h], to[h * K + k]);
    });
    return;
  }
  parallel(p, K, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      C* const row = total.get() + k * pitch;
      if (plan.aligned) {
        for (int64_t h = 0; h < p.heads; ++h) {
          Vec<C> sum = {};
          for (int64_t g = 0; g < splits; ++g)
            sum += load_bytes<Vec<C>>(&sums.filters[g * sums.filter_size + (h * K + k) * V]);
          row[h] = sum_lanes<C>(sum);
        }
      } else {
        for (int64_t i = 0; i < plan.blocks; ++i) {
          const ChannelBlock block = plan.block(i, p.channels);
          const int64_t width = vector_width<T>(block);
          for (int64_t v = 0; v < width; v += V) {
            Vec<C> sum = {};
            for (int64_t g = 0; g < splits; ++g)
              sum += load_bytes<Vec<C>>(&sums.filters[g * sums.filter_size + block.first * K + k * width + v]);
            store_bytes(&sums.filters[block.first * K + k * width + v], sum);  // the first split's, no longer needed
          }
          for (int64_t c = 0; c < block.size(); ++c)
            row[(block.first + c) / per_head] +=
                sums.filters[block.first * K + k * width + vector_position<Lanes<T>>(c)];
        }
      }
    }
  });
  finish_shared_gradient<C>(p, total.get(), shared->soft(), p.grad_weight);
}

template <class T>
inline void reduce_bias(const ConvBackward& p, const ChannelPlan& plan, const PartialSums<Compute<T>>& sums,
                        int64_t splits) {
  with_dtype(p.bias_dtype, [&](auto* tag) {
    auto* to = static_cast<decltype(tag)>(p.grad_bias);
    for (int64_t i = 0; i < plan.blocks; ++i) {
      const ChannelBlock block = plan.block(i, p.channels);
      for (int64_t c = 0; c < block.size(); ++c) {
        Compute<T> sum{};
        for (int64_t g = 0; g < splits; ++g)
          sum += sums.bias[g * sums.bias_size + block.first + vector_position<Lanes<T>>(c)];
        from_float(sum, to[block.first + c]);
      }
    }
  });
}

}  // namespace ck::cpu::CK_ISA
