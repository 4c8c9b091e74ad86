// The inputs of attention in the compute type, as the kernels read them: keys and values in rows and in panels, tables,
// and which keys each query may see.
#pragma once

#include "filters.h"
#include "multiply.h"

namespace ck::cpu::CK_ISA {

// n values of any type and stride, times `factor`, one after the other; then zeros up to a whole vector.
template <class C>
inline void convert_in(Dtype dtype, const void* data, int64_t at, int64_t stride, int64_t n, C factor, C* out) {
  constexpr int V = kLanes<C>;
  with_dtype(dtype, [&](auto* tag) {
    using T = __typeof__(*tag);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      const T* const from = static_cast<const T*>(data) + at;
      if (stride == 1) {
        for (int64_t i = 0; i < n; i += V) store_bytes(out + i, load_natural(from + i, from + n) * factor);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(from[i * stride]) * factor;
        for (int64_t i = n; i % V != 0; ++i) out[i] = 0;
      }
    }
  });
}

// The way back.
template <class C>
inline void convert_out(Dtype dtype, const C* from, int64_t n, void* data, int64_t at, int64_t stride) {
  constexpr int V = kLanes<C>;
  with_dtype(dtype, [&](auto* tag) {
    using T = __typeof__(*tag);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      T* const out = static_cast<T*>(data) + at;
      if (stride == 1) {
        for (int64_t i = 0; i < n; i += V) store_natural(out + i, load_bytes<Vec<C>>(from + i), n - i);
      } else {
        for (int64_t i = 0; i < n; ++i) from_float(from[i], out[i * stride]);
      }
    }
  });
}

template <class C>
inline void read_row(const Attention& p, const HeadRows& t, int64_t b, int64_t i, int64_t h, int64_t n, C factor,
                     C* out) {
  convert_in(p.dtype, t.data, b * t.batch + i * t.time + h * t.head, t.channel, n, factor, out);
}

template <class C>
inline void write_row(const Attention& p, const HeadRows& t, int64_t b, int64_t i, int64_t h, int64_t n,
                      const C* from) {
  convert_out(p.dtype, from, n, t.data, b * t.batch + i * t.time + h * t.head, t.channel);
}

template <class C>
inline C& scalar(const HeadScalars& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<C*>(t.data)[b * t.batch + h * t.head + i * t.time];
}

template <class C>
CK_INLINE void clear(C* data, int64_t n) {
  memset(static_cast<void*>(data), 0, static_cast<size_t>(n) * sizeof(C));
}

// to[0 .. n) += from[0 .. n) * factor
template <class C>
CK_INLINE void add_to(C* to, const C* from, int64_t n, C factor = 1) {
  constexpr int V = kLanes<C>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store_bytes(to + i, load_bytes<Vec<C>>(to + i) + load_bytes<Vec<C>>(from + i) * factor);
  for (; i < n; ++i) to[i] += from[i] * factor;
}

template <class C>
CK_INLINE C dot(const C* a, const C* b, int64_t n) {
  constexpr int V = kLanes<C>;
  Vec<C> sum = {};
  int64_t i = 0;
  for (; i + V <= n; i += V) sum += load_bytes<Vec<C>>(a + i) * load_bytes<Vec<C>>(b + i);
  C total = sum_lanes<C>(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

template <class C>
CK_INLINE C total(const C* a, int64_t n) {
  constexpr int V = kLanes<C>;
  Vec<C> sum = {};
  int64_t i = 0;
  for (; i + V <= n; i += V) sum += load_bytes<Vec<C>>(a + i);
  C result = sum_lanes<C>(sum);
  for (; i < n; ++i) result += a[i];
  return result;
}

// Keys that one query may see, or taps that it may read.
struct Range {
  int64_t first, end;

  bool empty() const { return first >= end; }
};

// What a query is to the keys.
struct Place {
  int64_t at;      // where it stands among them
  Range sequence;  // the keys of its sequence
  Range visible;   // those it attends to, padding aside

  // Taps of the depthwise term whose values exist.
  Range taps(const Attention& p) const {
    const int64_t start = at - p.left;
    return {most(0, sequence.first - start), least(p.causal ? p.left + 1 : p.window(), sequence.end - start)};
  }
};

constexpr int64_t kQueryRows = 32;    // queries that are worked on together
constexpr int64_t kKeyColumns = 128;  // and keys
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;  // keys of a panel, [channels][kPanel]

class Places {
 public:
  explicit Places(const AttentionProblem& p) : places_(p.queries), ranges_(ceil_div(p.queries, kQueryRows)) {
    int64_t sequence = 0;
    for (int64_t i = 0; i < p.queries; ++i) {
      Place& place = places_[i];
      if (p.query_offsets == nullptr) {
        place = {i + p.keys - p.queries, {0, p.keys}, {}};
      } else {
        while (p.query_offsets[sequence + 1] <= i) ++sequence;
        const int64_t* const keys = p.key_offsets + sequence;
        place = {i + keys[1] - p.query_offsets[sequence + 1], {keys[0], keys[1]}, {}};
      }
      Range& visible = place.visible = place.sequence;
      if (p.causal) visible.end = least(visible.end, place.at + 1);
      if (p.outside == Outside::kMask) {
        visible.first = most(visible.first, place.at - p.left);
        visible.end = least(visible.end, place.at + p.right + 1);
      }
      Range& all = ranges_[i / kQueryRows];
      if (i % kQueryRows == 0) all = {p.keys, 0};
      if (!visible.empty()) all = {least(all.first, visible.first), most(all.end, visible.end)};
    }
  }

  const Place* of(int64_t i) const { return places_.get() + i; }
  // The keys that some query of a block sees.
  Range seen_by(int64_t block) const { return ranges_[block]; }

 private:
  Scratch<Place> places_;
  Scratch<Range> ranges_;
};

struct Axis {
  int64_t size, stride;
};

// A table in the compute type, [heads][outer][pitch]; pitch is inner.size in whole vectors.
template <class C>
class PackedTable {
 public:
  // start: the element of each head that comes first.
  PackedTable(const Attention& p, const HeadTable& t, int64_t start, Axis outer, Axis inner, C factor)
      : pitch_(round_up(inner.size, kLanes<C>)),
        head_(t.per_head ? outer.size * pitch_ : 0),
        given_(t.data != nullptr),
        data_(!given_ ? 0 : (t.per_head ? p.heads : 1) * outer.size * pitch_) {
    if (!given_) return;
    for (int64_t h = 0; h < (t.per_head ? p.heads : 1); ++h)
      for (int64_t o = 0; o < outer.size; ++o)
        convert_in(t.dtype, t.data, start + h * t.head + o * outer.stride, inner.stride, inner.size, factor,
                   data_.get() + (h * outer.size + o) * pitch_);
  }

  // nullptr: the term is not there.
  const C* of(int64_t h) const { return given_ ? data_.get() + h * head_ : nullptr; }
  int64_t pitch() const { return pitch_; }

 private:
  int64_t pitch_, head_;
  bool given_;
  Scratch<C> data_;
};

// The keys or the values of all groups, padding replaced by zeros. Behind the last one zeros fill a panel.
template <class C>
class PackedKeys {
 public:
  PackedKeys(const AttentionProblem& p, const HeadRows& t, bool rows, bool panels, bool threads)
      : groups_(p.groups),
        channels_(p.channels),
        pitch_(round_up(p.channels, kLanes<C>)),
        padded_(round_up(p.keys, P)),
        rows_(rows ? p.batch * p.groups * padded_ * pitch_ : 0),
        panels_(panels ? p.batch * p.groups * padded_ * channels_ : 0) {
    const int64_t pieces = padded_ / P;
    parallel(p, p.batch * p.groups * pieces, threads, [&](int64_t begin, int64_t end) {
      Scratch<C> own(pitch_);
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t b = piece / pieces / groups_, g = piece / pieces % groups_;
        for (int64_t n = 0; n < P; ++n) {
          const int64_t j = piece % pieces * P + n;
          C* const row = rows ? rows_.get() + (piece * P + n) * pitch_ : own.get();
          const bool real = j < p.keys && (p.key_mask == nullptr || p.key_mask[b * p.mask_batch + j * p.mask_key]);
          if (real)
            read_row<C>(p, t, b, j, g, channels_, 1, row);
          else
            clear(row, pitch_);
          if (panels)
            for (int64_t d = 0; d < channels_; ++d) panels_[(piece * channels_ + d) * P + n] = row[d];
        }
      }
    });
  }

  const C* row(int64_t b, int64_t g, int64_t j) const {
    return rows_.get() + ((b * groups_ + g) * padded_ + j) * pitch_;
  }

  // s[r][n] = rows of a times keys first .. first+n, where both are whole panels.
  void meet(int64_t b, int64_t g, int64_t first, int64_t n, int64_t rows, const C* a, C* s) const {
    for (int64_t j = 0; j < n; j += P)
      multiply<false>(rows, P, channels_, Factor<C>{a, pitch_, 1},
                      panels_.get() + ((b * groups_ + g) * padded_ + first + j) * channels_, P, s + j, kKeyColumns);
  }

 private:
  static constexpr int64_t P = kPanel<C>;
  int64_t groups_, channels_, pitch_, padded_;
  Scratch<C> rows_, panels_;
};

// All inputs but what belongs to a query.
template <class C>
struct AttentionData {
  const AttentionProblem& p;
  bool threads;
  int64_t pitch, rank_pitch, window_pitch;  // rows of channels, of rel_query and of columns, in whole vectors
  int64_t padded;                           // keys, in whole panels
  Places places;
  PackedTable<C> bias, query_rel, key_rel;    // the latter two by channel; key_rel with its columns reversed
  PackedTable<C> query_columns, key_columns;  // the same by column, for gradients
  PackedTable<C> value_conv, value_conv_bias, value_conv_scale;  // by tap
  PackedKeys<C> k, v;
  Scratch<C> hidden;      // [batch][padded]: not 0 where the mask hides a key
  Scratch<int64_t> real;  // [batch][keys + 1]: how many keys before a position the mask does not hide
  Scratch<C> edges;       // [batch][heads][2][padded]: what key_rel adds left and right of the window

  AttentionData(const AttentionProblem& problem, bool gradients)
      : p(problem),
        threads(p.batch * p.heads * p.queries * p.keys * p.channels >= 1 << 15),
        pitch(round_up(p.channels, kLanes<C>)),
        rank_pitch(round_up(p.rank, kLanes<C>)),
        window_pitch(round_up(p.window(), kLanes<C>)),
        padded(round_up(p.keys, kPanel<C>)),
        places(p),
        bias(p, p.bias, 0, {1, 0}, columns(p.bias), 1),
        query_rel(p, p.query_rel, 0, {p.rank, p.query_rel.row}, columns(p.query_rel), 1),
        key_rel(p, p.key_rel, last_column(), {p.channels, p.key_rel.row}, reversed(), scale()),
        query_columns(p, when(gradients, p.query_rel), 0, columns(p.query_rel), {p.rank, p.query_rel.row},
                      static_cast<C>(p.rel_scale)),
        key_columns(p, when(gradients, p.key_rel), last_column(), reversed(), {p.channels, p.key_rel.row}, scale()),
        value_conv(p, p.value_conv, 0, columns(p.value_conv), {p.channels, p.value_conv.row}, 1),
        value_conv_bias(p, p.value_conv_bias, 0, {1, 0}, {p.channels, p.value_conv_bias.row}, 1),
        value_conv_scale(p, p.value_conv_scale, 0, {1, 0}, {1, 0}, 1),
        k(p, p.k, gradients || p.key_rel.data != nullptr, true, threads),
        v(p, p.v, !gradients || p.value_conv.data != nullptr, gradients, threads),
        hidden(p.key_mask != nullptr ? p.batch * padded : 0),
        real(p.key_mask != nullptr ? p.batch * (p.keys + 1) : 0),
        edges(has_edges() ? p.batch * p.heads * 2 * padded : 0) {
    if (p.key_mask != nullptr) read_mask();
    if (has_edges()) find_edges();
  }

  bool sees_something(int64_t b, const Range& visible) const {
    if (visible.empty() || p.key_mask == nullptr) return !visible.empty();
    const int64_t* const before = real.get() + b * (p.keys + 1);
    return before[visible.end] > before[visible.first];
  }
  C scale() const { return static_cast<C>(p.scale); }
  bool has_edges() const { return p.key_rel.data != nullptr && p.clips(); }
  const C* edge(int64_t b, int64_t h, int64_t side) const {
    return edges.get() + ((b * p.heads + h) * 2 + side) * padded;
  }
  C conv_scale(int64_t h) const { return p.value_conv_scale.data == nullptr ? C{1} : value_conv_scale.of(h)[0]; }

  // u = value_conv_bias + sum over the taps of value_conv * v, before its scale.
  void convolve(int64_t b, int64_t h, const Place& place, C* u) const {
    if (p.value_conv_bias.data != nullptr)
      memcpy(static_cast<void*>(u), value_conv_bias.of(h), static_cast<size_t>(pitch) * sizeof(C));
    else
      clear(u, pitch);
    const Range taps = place.taps(p);
    for (int64_t c = taps.first; c < taps.end; ++c)
      multiply_add(u, value_conv.of(h) + c * pitch, v.row(b, h / p.sharing(), place.at - p.left + c));
  }

  // to += a * b, element by element
  void multiply_add(C* to, const C* a, const C* b) const {
    for (int64_t i = 0; i < pitch; i += kLanes<C>)
      store_bytes(to + i, load_bytes<Vec<C>>(to + i) + load_bytes<Vec<C>>(a + i) * load_bytes<Vec<C>>(b + i));
  }

 private:
  Axis columns(const HeadTable& t) const { return {p.window(), t.column}; }
  Axis reversed() const { return {p.window(), -p.key_rel.column}; }
  int64_t last_column() const { return (p.window() - 1) * p.key_rel.column; }
  static HeadTable when(bool wanted, const HeadTable& t) { return wanted ? t : HeadTable{}; }

  void read_mask() {
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t* const before = real.get() + b * (p.keys + 1);
      before[0] = 0;
      for (int64_t j = 0; j < padded; ++j) {
        const bool there = j < p.keys && p.key_mask[b * p.mask_batch + j * p.mask_key];
        hidden[b * padded + j] = there ? C{0} : C{1};
        if (j < p.keys) before[j + 1] = before[j] + (there ? 1 : 0);
      }
    }
  }

  void find_edges() {
    parallel(p, p.batch * p.heads, threads, [&](int64_t begin, int64_t end) {
      Scratch<C> outer(2 * pitch);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t b = n / p.heads, h = n % p.heads;
        clear(outer.get(), 2 * pitch);
        for (int64_t d = 0; d < p.channels; ++d) {
          outer[d] = key_rel.of(h)[d * window_pitch];
          outer[pitch + d] = key_rel.of(h)[d * window_pitch + p.window() - 1];
        }
        for (int64_t side = 0; side < 2; ++side)
          for (int64_t j = 0; j < padded; ++j)
            edges[(n * 2 + side) * padded + j] = dot(k.row(b, h / p.sharing(), j), outer.get() + side * pitch, pitch);
      }
    });
  }
};

}  // namespace ck::cpu::CK_ISA
