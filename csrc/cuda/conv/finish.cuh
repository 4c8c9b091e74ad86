// The epilogue of the forward passes: what becomes of their sums, in the accumulation type, before they are rounded.
#pragma once

#include "csrc/common/switch.h"
#include "csrc/cuda/conv/inputs.cuh"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

// Finishes sums, the first of which is that of batch row b, position t and channel c.
template <class T>
class FinishAt {
 public:
  using C = Compute<T>;

  CK_DEVICE FinishAt(const Finish& f, int64_t b, int64_t t, int64_t c)
      : f_(f),
        out_gate_(at<const T>(f.out_gate, b, t, c)),
        other_(at<const T>(other(), b, t, c)),
        grad_out_gate_(at<T>(f.grad_out_gate, b, t, c)) {}

  // Of this one sum the number to be stored.
  CK_DEVICE C finished(C sum) const {
    const C out_gate = f_.out_gate.data == nullptr ? C{1} : widen(*out_gate_);
    const C rest = other().data == nullptr ? C{0} : widen(*other_);
    C to_out_gate = 0;
    const C y = f_.differentiates() ? finished<true>(sum, out_gate, rest, to_out_gate)
                                    : finished<false>(sum, out_gate, rest, to_out_gate);
    if (f_.grad_out_gate.data != nullptr) *grad_out_gate_ = narrow<T>(to_out_gate);
    return y;
  }

  // The same, in place, of kPieces times so many sums as words hold of T, which lie side by side in memory. sums(i):
  // those of piece i; count(i): how many of them exist, whole vectors of `bytes`; step(tensor): how far apart pieces
  // are. All is asked for before anything is waited for.
  template <int kWords, int kPieces, class Sums, class Count, class Step>
  CK_DEVICE void finish(const Sums& sums, const Count& count, const Step& step, int bytes) const {
    uint32_t out_gates[kPieces][kWords], others[kPieces][kWords];
    load(out_gates, f_.out_gate, out_gate_, 1, count, step, bytes);
    load(others, other(), other_, 0, count, step, bytes);
    const auto finish_all = [&](auto differentiates) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        constexpr int kCount = kWords * kPerWord<T>;
        float out_gate[kCount], rest[kCount], to_out_gate[kCount] = {};
        unpack<T>(out_gate, out_gates[i]);
        unpack<T>(rest, others[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e)
          sums(i)[e] = finished<decltype(differentiates)::value>(sums(i)[e], out_gate[e], rest[e], to_out_gate[e]);
        if (decltype(differentiates)::value && f_.grad_out_gate.data != nullptr) {
          uint32_t words[kWords];
          pack<T>(words, to_out_gate);
          store_pieces(grad_out_gate_ + i * step(f_.grad_out_gate), words, count(i), bytes);
        }
      }
    };
    if (f_.differentiates())
      finish_all(Bool<true>{});
    else
      finish_all(Bool<false>{});
  }

 private:
  // d(y), or the residual.
  CK_DEVICE const Rows& other() const { return f_.differentiates() ? f_.grad : f_.residual; }

  // The one place that says what the epilogue is.
  template <bool kDifferentiates>
  CK_DEVICE C finished(C sum, C out_gate, C other, C& to_out_gate) const {
    const C open = sigmoid<T>(sum), value = activated(sum, open, f_.activation);
    if constexpr (!kDifferentiates) return other + out_gate * value;
    to_out_gate = other * value;
    return times_slope(other * out_gate, sum, open, f_.activation);
  }

  // Loads pieces of a tensor, or, where there is none, the number `none`.
  template <int kWords, int kPieces, class Count, class Step>
  static CK_DEVICE void load(uint32_t (&words)[kPieces][kWords], const Rows& rows, const T* from, float none,
                             const Count& count, const Step& step, int bytes) {
    if (rows.data == nullptr) {
      float all[kWords * kPerWord<T>];
      for (float& one : all) one = none;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) pack<T>(words[i], all);
      return;
    }
    const int64_t hop = step(rows);
    if (bytes >= 4 * kWords) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i, from += hop) load_pieces(words[i], from, count(i), 4 * kWords);
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i, from += hop) load_pieces(words[i], from, count(i), bytes);
    }
  }

  const Finish& f_;
  const T *out_gate_, *other_;
  T* grad_out_gate_;
};

}  // namespace ck::cuda
