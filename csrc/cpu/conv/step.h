// tap_step: decoding keeps the last span inputs, oldest first. The output of a step is a forward pass over one
// position.
#pragma once

#include "csrc/cpu/conv/forward.h"

namespace ck::cpu::CK_ISA {

// state receives, for every batch row, the rows of p.state without the oldest, and then x after its gate.
template <class T>
inline const char* shift_state_typed(const ConvForward& p, T* state) {
  const RowReader<T> reader = input_reader<T>(p);
  const int64_t size = p.taps.span() * p.channels, kept = size - p.channels;
  const ChannelBlock all{0, p.channels, true};
  parallel(p, p.batch, worth_threads(p), [&](int64_t begin, int64_t end) {
    Scratch<Compute<T>> row(vector_width<T>(all));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t from = p.state_row != nullptr ? p.state_row[b] : b;
      T* const to = state + b * size;
      memmove(static_cast<void*>(to), reader.state + from * size + p.channels, static_cast<size_t>(kept) * sizeof(T));
      reader.convert({b, 0, 1, from, 0}, 0, all, row.get());
      for (int64_t u = 0, n = p.channels; n > 0; ++u, n -= Lanes<T>::kUnit) {
        constexpr int P = Lanes<T>::kParts, V = kLanes<Compute<T>>;
        Vec<Compute<T>> v[P];
        for (int part = 0; part < P; ++part) v[part] = load_bytes<Vec<Compute<T>>>(row.get() + (u * P + part) * V);
        store_unit(to + kept + u * Lanes<T>::kUnit, 1, n, v);
      }
    }
  });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
