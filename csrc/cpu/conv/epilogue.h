// What gates and results go through.
#pragma once

#include "csrc/common/conv.h"
#include "csrc/cpu/lanes.h"

namespace ck::cpu::CK_ISA {

// act(a) and act'(a).
template <class C>
struct Activated {
  Vec<C> value, slope;
};

// Whether activations of tensors of T are computed to the last places of the type that is computed with.
template <class T>
constexpr bool kClose = sizeof(T) == sizeof(Compute<T>);

template <bool kToTheLast, Activation kActivation, class C>
CK_INLINE Activated<C> activate(Vec<C> a) {
  const Vec<C> one = splat(C{1});
  if constexpr (kActivation == Activation::kNone) return {a, one};
  const Vec<C> s = vsigmoid<C, kToTheLast>(a);
  if constexpr (kActivation == Activation::kSigmoid) return {s, s * (one - s)};
  return {a * s, s * (one + a * (one - s))};
}
template <class T, class C = Compute<T>>
CK_INLINE Activated<C> activate(Activation activation, Vec<C> a) {
  if (activation == Activation::kNone) return activate<kClose<T>, Activation::kNone, C>(a);
  return activation == Activation::kSigmoid ? activate<kClose<T>, Activation::kSigmoid, C>(a)
                                            : activate<kClose<T>, Activation::kSilu, C>(a);
}

template <Activation kActivation>
using Constant = std::integral_constant<Activation, kActivation>;

// Calls a function with an activation that is known when it is compiled.
template <class F>
CK_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone: return f(Constant<Activation::kNone>());
    case Activation::kSigmoid: return f(Constant<Activation::kSigmoid>());
    case Activation::kSilu: return f(Constant<Activation::kSilu>());
  }
}

// From the sums of a block of rows to what is stored (Finish). Each tensor has a pointer to every row, which lies as
// Src says; nullptr: there is none.
template <class Src>
struct Epilogue {
  using C = typename Src::C;
  using Elem = typename Src::Elem;
  Activation activation;
  bool close;  // kClose of the tensors
  const Elem *const *out_gate, *const *residual, *const *grad;
  Elem* const* grad_out_gate;
  int64_t first_row = 0, first_unit = 0;

  // The part of the block from a row and a unit on.
  CK_INLINE Epilogue from(int64_t row, int64_t unit) const {
    Epilogue part = *this;
    part.first_row += row;
    part.first_unit += unit;
    return part;
  }

  // Stores `units` units of `rows` rows: sums(i, u) gives the vectors of one.
  template <class Sums>
  CK_INLINE void store(int64_t rows, int64_t units, const Sums& sums, Elem* const* out, int64_t unit,
                       bool stream) const {
    with_kind([&](auto constant, auto to_the_last) CK_INLINE_LAMBDA {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t u = 0; u < units; ++u)
          store_unit<constant.value, to_the_last.value>(sums(i, u), i, unit + u, out[i], stream);
    });
  }

  // Calls a function with the activation, and how it is computed, that are known when it is compiled.
  template <class F>
  CK_INLINE void with_kind(const F& f) const {
    with_activation(activation, [&](auto constant) CK_INLINE_LAMBDA {
      if constexpr (sizeof(Elem) == sizeof(C) && constant.value != Activation::kNone)
        if (close) return f(constant, std::true_type());
      f(constant, std::false_type());
    });
  }

  // Stores unit u of a row.
  template <Activation kActivation, bool kToTheLast>
  CK_INLINE void store_unit(const Vec<C>* sums, int64_t row, int64_t u, Elem* out, bool stream) const {
    constexpr int P = Src::kParts;
    row += first_row;
    const int64_t unit = first_unit + u;
    Vec<C> open[P] = {}, other[P] = {}, y[P];
    if (out_gate != nullptr) load(out_gate[row], unit, open);
    if (grad == nullptr) {
      if (residual != nullptr) load(residual[row], unit, other);
      CK_UNROLL for (int p = 0; p < P; ++p) {
        y[p] = activate<kToTheLast, kActivation, C>(sums[p]).value;
        if (out_gate != nullptr) y[p] *= open[p];
        if (residual != nullptr) y[p] += other[p];
      }
    } else {
      Vec<C> of_gate[P];
      load(grad[row], unit, other);
      CK_UNROLL for (int p = 0; p < P; ++p) {
        const Activated<C> a = activate<kToTheLast, kActivation, C>(sums[p]);
        of_gate[p] = other[p] * a.value;
        y[p] = (out_gate != nullptr ? other[p] * open[p] : other[p]) * a.slope;
      }
      if (grad_out_gate != nullptr) Src::store(grad_out_gate[row], unit, of_gate, false);
    }
    Src::store(out, u, y, stream);
  }

 private:
  static CK_INLINE void load(const Elem* row, int64_t unit, Vec<C>* v) {
    v[0] = Src::template load<0>(row, unit);
    if constexpr (Src::kParts == 2) v[1] = Src::template load<1>(row, unit);
  }
};

}  // namespace ck::cpu::CK_ISA
