// From weights to filters: softmax over taps, weight dropout, and the way back for their gradients.
#pragma once

#include "csrc/cuda/conv/inputs.cuh"
#include "csrc/cuda/device/dropout.cuh"
#include "csrc/cuda/device/reduce.cuh"

namespace ck::cuda {

// The filter of batch row b, position t and head h. Filters that serve all positions have t = 0, and those that serve
// all batch rows b = 0: they are the coordinates of weight dropout.
struct FilterAt {
  int64_t b, t, h, base;

  CK_DEVICE FilterAt(const Problem& p, int64_t batch, int64_t position, int64_t head)
      : b(p.per_batch || p.per_position ? batch : 0),
        t(p.per_position ? position : 0),
        h(head),
        base(b * p.weight_batch + t * p.weight_time + h * p.weight_head) {}
};

template <class C>
CK_DEVICE C logit(const Problem& p, const FilterAt& f, int64_t j) {
  return load_as<C>(p.weight, f.base + j * p.weight_tap, p.weight_dtype);
}

// Whether tap j has a share of the softmax of output t: with renormalize only if the row it reads exists.
CK_DEVICE bool has_share(const Problem& p, int64_t t, int64_t j, const Sequence& sequence) {
  const int64_t s = p.taps.source(t, j);
  return !p.renormalize || (s >= sequence.first && s < sequence.end);
}

// Maximum and reciprocal sum of the exponentials of a filter's logits; (0, 1) without softmax.
template <class C>
struct Statistics {
  C max = 0, inverse = 1;
};

template <class C>
CK_DEVICE Statistics<C> statistics_of(const Problem& p, const FilterAt& f, int64_t t, const Sequence& sequence) {
  if (!p.softmax) return {};
  C highest = -infinity<C>(), total = 0;
#pragma unroll 1
  for (int64_t j = 0; j < p.taps.taps; ++j)
    if (has_share(p, t, j, sequence)) {
      const C value = logit<C>(p, f, j);
      highest = value > highest || value != value ? value : highest;
    }
  // Without a tap that exists all weights are 0; logits of -inf alone give NaN, as everywhere.
  bool any = false;
#pragma unroll 1
  for (int64_t j = 0; j < p.taps.taps; ++j)
    if (has_share(p, t, j, sequence)) {
      any = true;
      total += exponential(logit<C>(p, f, j) - highest);
    }
  return any ? Statistics<C>{highest, 1 / total} : Statistics<C>{0, 0};
}

// Dropout's multiplier of tap j.
template <class C>
CK_DEVICE C dropout_factor(const Problem& p, const FilterAt& f, int64_t j) {
  if (p.seed == nullptr) return 1;
  const PhiloxBlock words = tap_words(static_cast<uint64_t>(*p.seed), f.b, f.t, f.h, j / 4);
  return keep_factor<C>(p, words, j);
}

// p: after softmax.  factor: dropout's multiplier.  Their product is the filter's value.
template <class C>
struct Tap {
  C p, factor;

  CK_DEVICE C value() const { return p * factor; }
};

template <class C>
CK_DEVICE Tap<C> tap_of(const Problem& p, const FilterAt& f, int64_t t, int64_t j, const Statistics<C>& statistics,
                        const Sequence& sequence) {
  C value = logit<C>(p, f, j);
  if (p.softmax) value = has_share(p, t, j, sequence) ? exponential(value - statistics.max) * statistics.inverse : C{0};
  return {value, dropout_factor<C>(p, f, j)};
}

// What statistics_of finds, by a group of `width` lanes with a tap each. All lanes of the warp take part; those of a
// group that has no filter say so by `exists`.
template <class C>
CK_DEVICE Statistics<C> warp_statistics(const Problem& p, const FilterAt& f, int64_t t, int lane,
                                        const Sequence& sequence, int width = 32, bool exists = true) {
  if (!p.softmax) return {};
  C highest = -infinity<C>(), total = 0;
  bool any = false;
  const int64_t taps = exists ? p.taps.taps : 0;
#pragma unroll 1
  for (int64_t j = lane; j < taps; j += width)
    if (has_share(p, t, j, sequence)) {
      any = true;
      const C value = logit<C>(p, f, j);
      highest = value > highest || value != value ? value : highest;
    }
#pragma unroll 1
  for (int distance = width / 2; distance > 0; distance /= 2) {
    const C other = __shfl_xor_sync(kAllLanes, highest, distance);
    highest = other > highest || other != other ? other : highest;
  }
#pragma unroll 1
  for (int64_t j = lane; j < taps; j += width)
    if (has_share(p, t, j, sequence)) total += exponential(logit<C>(p, f, j) - highest);
  total = lane_sum(total, width);
  return lane_sum(any ? 1 : 0, width) > 0 ? Statistics<C>{highest, 1 / total} : Statistics<C>{0, 0};
}

// Calls use(j, value) for the taps of a filter that positions share, a lane for each tap. By the warp.
template <class C, class Use>
CK_DEVICE void for_shared_taps(const Problem& p, const FilterAt& f, const Use& use) {
  const Sequence anywhere{0, 0, 0, kUnbounded};
  const int lane = threadIdx.x % 32;
  const Statistics<C> statistics = warp_statistics<C>(p, f, 0, lane, anywhere);
#pragma unroll 1
  for (int64_t j = lane; j < p.taps.taps; j += 32) use(j, tap_of(p, f, 0, j, statistics, anywhere).value());
}

}  // namespace ck::cuda
