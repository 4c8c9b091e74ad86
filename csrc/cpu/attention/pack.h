// The inputs of attention in the compute type, as the kernels read them: keys and values in rows and in panels, tables,
// and which keys each query may see.
#pragma once

#include "csrc/common/philox.h"
#include "csrc/cpu/attention/multiply.h"
#include "csrc/cpu/attention/problem.h"
#include "csrc/cpu/parallel.h"

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
CK_INLINE C sum(const C* row, int64_t n) {
  constexpr int V = kLanes<C>;
  Vec<C> lanes = {};
  int64_t i = 0;
  for (; i + V <= n; i += V) lanes += load_bytes<Vec<C>>(row + i);
  C total = sum_lanes<C>(lanes);
  for (; i < n; ++i) total += row[i];
  return total;
}

// Whether a row, of whole vectors, holds no NaN and no infinity.
template <class C>
CK_INLINE bool is_finite(const C* row, int64_t width) {
  Vec<C> sum = {};
  for (int64_t i = 0; i < width; i += kLanes<C>) sum += load_bytes<Vec<C>>(row + i) * C{0};
  return sum_lanes<C>(sum) == C{0};
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
CK_INLINE void multiply_by(C* data, int64_t width, C factor) {
  for (int64_t i = 0; i < width; i += kLanes<C>) store_bytes(data + i, load_bytes<Vec<C>>(data + i) * factor);
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

constexpr int64_t kFewQueries = 4;    // are not worth panels of the keys: decoding
constexpr int64_t kQueryRows = 96;    // queries that are worked on together
constexpr int64_t kKeyColumns = 256;  // and keys
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;  // keys of a panel, [channels][kPanel]

// Distance of rows of so many elements: an odd number of cache lines, so that a column of rows does not crowd into few
// sets of the first cache.
template <class C>
constexpr int64_t row_pitch(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(C);
  return ((width + kLine - 1) / kLine | 1) * kLine;
}
template <class C>
constexpr int64_t kScorePitch = row_pitch<C>(kKeyColumns);

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
      if (visible.empty()) continue;
      all = {least(all.first, visible.first), most(all.end, visible.end)};
      leave_ = leave_ || visible.first < place.at - p.left || visible.end > place.at + p.right + 1;
      most_seen_ = most(most_seen_, all.end - all.first);
    }
  }

  const Place* of(int64_t i) const { return places_.get() + i; }
  // The keys that some query of a block sees.
  Range seen_by(int64_t block) const { return ranges_[block]; }
  int64_t most_seen() const { return most_seen_; }
  bool leave_window() const { return leave_; }  // some query sees keys outside its window

 private:
  Scratch<Place> places_;
  Scratch<Range> ranges_;
  int64_t most_seen_ = 0;
  bool leave_ = false;
};

struct Axis {
  int64_t size, stride;
};

// How a table of outer.size rows lies in memory: vector v of row o is at o * row + v * step. Either rows follow each
// other, or the panels of one vector of every row, so that a product with a few columns reads one piece of memory.
template <class C>
struct Layout {
  static constexpr int V = kLanes<C>;

  Axis outer, inner;  // strides: of the tensor
  int64_t row, step;

  static Layout rows(Axis outer, Axis inner) { return {outer, inner, round_up(inner.size, V), V}; }
  static Layout panels(Axis outer, Axis inner) { return {outer, inner, V, outer.size * V}; }

  int64_t size() const { return outer.size * round_up(inner.size, V); }
  int64_t at(int64_t o, int64_t i) const { return o * row + i / V * step + i % V; }
};

// A table in the compute type, of the heads of one group, each as it is first chosen.
template <class C>
class PackedTable {
 public:
  PackedTable(const Attention& p, const HeadTable& t, Layout<C> layout, C factor)
      : table_(t),
        layout_(layout),
        factor_(factor),
        slots_(t.data == nullptr ? 0
               : t.per_head      ? p.sharing()
                                 : 1),
        data_(slots_ * layout.size()),
        held_(slots_) {
    for (int64_t n = 0; n < slots_; ++n) held_[n] = -1;
  }

  void choose(int64_t h) {
    if (slots_ == 0) return;
    const int64_t head = table_.per_head ? h : 0, slot = head % slots_;
    chosen_ = data_.get() + slot * layout_.size();
    if (held_[slot] != head) pack(head * table_.head);
    held_[slot] = head;
  }

  const C* get() const { return chosen_; }  // nullptr: the term is not there
  const C& at(int64_t o, int64_t i) const { return chosen_[layout_.at(o, i)]; }
  // From a column on that begins a vector.
  Vectors<const C> from(int64_t o, int64_t i) const { return {chosen_ + layout_.at(o, i), layout_.row, layout_.step}; }

 private:
  static constexpr int V = kLanes<C>;

  // Rows of the tensor's contiguous axis are read whole, and turned where that is the outer one.
  void pack(int64_t start) {
    const Axis outer = layout_.outer, inner = layout_.inner;
    const bool turn = outer.stride == 1 && inner.stride != 1;
    const Axis along = turn ? outer : inner, across = turn ? inner : outer;
    const int64_t pitch = row_pitch<C>(along.size);
    Scratch<C> rows(V * pitch);
    for (int64_t a = 0; a < across.size; a += V) {
      for (int64_t n = 0; n < V; ++n)
        if (a + n < across.size)
          convert_in(table_.dtype, table_.data, start + (a + n) * across.stride, along.stride, along.size, factor_,
                     rows.get() + n * pitch);
        else
          clear(rows.get() + n * pitch, pitch);
      for (int64_t i = 0; i < along.size; i += V) {
        Vec<C> square[V];
        CK_UNROLL for (int n = 0; n < V; ++n) square[n] = load_bytes<Vec<C>>(rows.get() + n * pitch + i);
        if (turn) transpose<C>(square);
        const int64_t o = turn ? i : a;
        CK_UNROLL for (int n = 0; n < V; ++n) {
          if (o + n >= outer.size) break;
          store_bytes(chosen_ + layout_.at(o + n, turn ? a : i), square[n]);
        }
      }
    }
  }

  HeadTable table_;
  Layout<C> layout_;
  C factor_;
  int64_t slots_;
  Scratch<C> data_;
  Scratch<int64_t> held_;  // their heads
  C* chosen_ = nullptr;
};

inline bool any(const bool* flags, int64_t n) { return memchr(flags, 1, static_cast<size_t>(n)) != nullptr; }

// Rows with zeros in the place of the odd ones, in `clean`; the rows themselves where none is odd.
template <class C>
inline const C* without_odd(int64_t n, const C* rows, int64_t pitch, const bool* odd, C* clean) {
  if (!any(odd, n)) return rows;
  memcpy(static_cast<void*>(clean), rows, static_cast<size_t>(n * pitch) * sizeof(C));
  for (int64_t i = 0; i < n; ++i)
    if (odd[i]) clear(clean + i * pitch, pitch);
  return clean;
}

// c[r] += sum over k of a[r][k] * b[k], rows of `width` and `pitch`, where a is 0 unless sees(r, k). Of the odd rows of
// b each is added by itself, to the rows of c that see it. clean: room for b.
template <class C, class Sees>
inline void multiply_seen(int64_t rows, int64_t width, int64_t depth, Factor<C> a, const C* b, int64_t pitch,
                          const bool* odd, C* clean, C* c, const Sees& sees) {
  const C* const even = without_odd(depth, b, pitch, odd, clean);
  multiply<true>(rows, width, depth, a, {even, pitch}, Vectors<C>{c, pitch});
  for (int64_t k = 0; even != b && k < depth; ++k)
    for (int64_t r = 0; odd[k] && r < rows; ++r)
      if (sees(r, k)) add_to(c + r * pitch, b + k * pitch, width, a.data[r * a.row + k * a.step]);
}

// c[r] += sum over k of a[k][r] * b[k], as in the gradients of tables. An odd row of a is added by itself, where b is
// not 0.
template <class C>
inline void multiply_met(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row, const bool* odd,
                         C* clean, const C* b, int64_t b_row, Vectors<C> c) {
  const C* const even = without_odd(depth, a, a_row, odd, clean);
  multiply<true>(rows, columns, depth, Factor<C>{even, 1, a_row}, {b, b_row}, c);
  for (int64_t k = 0; even != a && k < depth; ++k)
    for (int64_t r = 0; odd[k] && r < rows; ++r)
      for (int64_t i = 0; i < columns; ++i)
        if (b[k * b_row + i] != C{0})
          c.from(r, i / kLanes<C>).data[i % kLanes<C>] += a[k * a_row + r] * b[k * b_row + i];
}

// The keys or the values of one group, padding replaced by zeros, which also fill the last panel.
template <class C>
class PackedRows {
 public:
  // factor: of what lies in panels. watch: note at once which rows are odd.
  PackedRows(const Attention& p, const HeadRows& source, bool rows, bool panels, C factor, bool watch)
      : p_(p),
        source_(source),
        width_(round_up(p.channels, V)),
        pitch_(row_pitch<C>(width_)),
        padded_(round_up(p.keys, P)),
        factor_(factor),
        rows_((rows ? padded_ : P) * pitch_),
        panels_(panels ? padded_ * width_ : 0),
        odd_(padded_),
        keep_rows_(rows),
        fill_panels_(panels),
        watch_(watch) {}

  void load(int64_t b, int64_t g) {
    for (int64_t j = 0; j < padded_; j += P) {
      C* const rows = rows_.get() + (keep_rows_ ? j * pitch_ : 0);
      for (int64_t n = 0; n < P; ++n) {
        const bool real =
            j + n < p_.keys && (p_.key_mask == nullptr || p_.key_mask[b * p_.mask_batch + (j + n) * p_.mask_key]);
        if (real)
          read_row<C>(p_, source_, b, j + n, g, p_.channels, 1, rows + n * pitch_);
        else
          clear(rows + n * pitch_, width_);
        if (watch_) odd_[j + n] = !is_finite(rows + n * pitch_, width_);
      }
      if (fill_panels_) fill_panel(rows, panels_.get() + j * width_);
    }
  }

  const C* row(int64_t j) const { return rows_.get() + j * pitch_; }

  // Odd rows hold a NaN or an infinity, which a weight of 0 would spread.
  void find_odd() const {
    for (int64_t j = 0; j < padded_; ++j) odd_[j] = !is_finite(row(j), width_);
  }
  const bool* odd(int64_t first) const { return odd_.get() + first; }
  bool has_odd(int64_t first, int64_t n) const { return any(odd(first), n); }

  // s[r][n] = rows of a times rows first .. first+n, both whole panels, times the factor.
  void meet(int64_t first, int64_t n, int64_t rows, const C* a, C* s) const {
    if (!fill_panels_) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t r = 0; r < rows; ++r)
          s[r * kScorePitch<C> + j] = dot(a + r * pitch_, row(first + j), width_) * factor_;
      return;
    }
    for (int64_t j = 0; j < n; j += P)
      multiply<false>(rows, P, p_.channels, Factor<C>{a, pitch_, 1}, {panels_.get() + (first + j) * width_, P},
                      Vectors<C>{s + j, kScorePitch<C>});
  }

 private:
  static constexpr int64_t V = kLanes<C>, P = kPanel<C>;

  void fill_panel(const C* rows, C* panel) const {
    for (int64_t n = 0; n < P; n += V)
      for (int64_t d = 0; d < width_; d += V) {
        Vec<C> square[V];
        CK_UNROLL for (int64_t i = 0; i < V; ++i) square[i] = load_bytes<Vec<C>>(rows + (n + i) * pitch_ + d) * factor_;
        transpose<C>(square);
        CK_UNROLL for (int64_t i = 0; i < V; ++i) store_bytes(panel + (d + i) * P + n, square[i]);
      }
  }

  const Attention& p_;
  const HeadRows& source_;
  int64_t width_, pitch_, padded_;
  C factor_;
  Scratch<C> rows_, panels_;
  Scratch<bool> odd_;
  bool keep_rows_, fill_panels_, watch_;
};

// Scores and their exponentials are taken to base 2: what makes scores carries this factor.
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// Tables, places and masks, which all tasks share.
template <class C>
struct AttentionData {
  const AttentionProblem& p;
  bool threads;
  int64_t width, pitch;  // of a row of channels: whole vectors, and the distance to the next
  int64_t rank_pitch;    // rows of rel_query (of q, where there is none)
  int64_t padded;        // keys, in whole panels
  Places places;
  bool clips;             // outermost columns reach keys outside the window
  Scratch<C> hidden;      // [batch][padded]: not 0 where the mask hides a key
  Scratch<int64_t> real;  // [batch][keys + 1]: how many keys before a position the mask does not hide

  explicit AttentionData(const AttentionProblem& problem)
      : p(problem),
        threads(p.batch * p.heads * p.queries * p.keys * p.channels >= 1 << 15),
        width(round_up(p.channels, kLanes<C>)),
        pitch(row_pitch<C>(width)),
        rank_pitch(p.rel_query.data != nullptr ? row_pitch<C>(p.rank) : pitch),
        padded(round_up(p.keys, kPanel<C>)),
        places(p),
        clips(p.clips() && places.leave_window()),
        hidden(p.key_mask != nullptr ? p.batch * padded : 0),
        real(p.key_mask != nullptr ? p.batch * (p.keys + 1) : 0) {
    if (p.key_mask != nullptr) read_mask();
  }

  // How many of the keys from first to end the mask does not hide.
  int64_t count_real(int64_t b, int64_t first, int64_t end) const {
    if (p.key_mask == nullptr) return end - first;
    const int64_t* const before = real.get() + b * (p.keys + 1);
    return before[end] - before[first];
  }
  bool is_real(int64_t b, int64_t j) const { return count_real(b, j, j + 1) > 0; }
  bool sees_something(int64_t b, const Range& visible) const {
    return !visible.empty() && count_real(b, visible.first, visible.end) > 0;
  }
  C score_scale() const { return static_cast<C>(p.scale * kLog2e); }
  bool has_edges() const { return p.key_rel.data != nullptr && clips; }
  // Blocks of queries of one head.
  int64_t blocks() const { return ceil_div(p.queries, kQueryRows); }

  // to += a * b, element by element
  void multiply_add(C* to, const C* a, const C* b) const {
    for (int64_t i = 0; i < width; i += kLanes<C>)
      store_bytes(to + i, load_bytes<Vec<C>>(to + i) + load_bytes<Vec<C>>(a + i) * load_bytes<Vec<C>>(b + i));
  }

 private:
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
};

// The tables of one head.
template <class C>
struct HeadTables {
  PackedTable<C> bias, query_rel, key_rel;                       // base 2; the latter two by channel, in panels
  PackedTable<C> query_columns, key_columns;                     // by column, for gradients; the first times rel_scale
  PackedTable<C> value_conv, value_conv_bias, value_conv_scale;  // by tap

  HeadTables(const AttentionData<C>& d, bool gradients)
      : bias(d.p, d.p.bias, L::rows({1, 0}, columns(d, d.p.bias)), static_cast<C>(kLog2e)),
        query_rel(d.p, d.p.query_rel, L::panels({d.p.rank, d.p.query_rel.row}, columns(d, d.p.query_rel)),
                  static_cast<C>(d.p.rel_scale * kLog2e)),
        key_rel(d.p, d.p.key_rel, L::panels({d.p.channels, d.p.key_rel.row}, columns(d, d.p.key_rel)), d.score_scale()),
        query_columns(d.p, when(gradients, d.p.query_rel),
                      L::rows(columns(d, d.p.query_rel), {d.p.rank, d.p.query_rel.row}), static_cast<C>(d.p.rel_scale)),
        key_columns(d.p, when(gradients, d.p.key_rel),
                    L::rows(columns(d, d.p.key_rel), {d.p.channels, d.p.key_rel.row}), 1),
        value_conv(d.p, d.p.value_conv, L::rows(columns(d, d.p.value_conv), {d.p.channels, d.p.value_conv.row}), 1),
        value_conv_bias(d.p, d.p.value_conv_bias, L::rows({1, 0}, {d.p.channels, d.p.value_conv_bias.row}), 1),
        value_conv_scale(d.p, d.p.value_conv_scale, L::rows({1, 0}, {1, 0}), 1) {}

  void choose(int64_t h) {
    for (PackedTable<C>* table :
         {&bias, &query_rel, &key_rel, &query_columns, &key_columns, &value_conv, &value_conv_bias, &value_conv_scale})
      table->choose(h);
  }
  C conv_scale() const { return value_conv_scale.get() == nullptr ? C{1} : *value_conv_scale.get(); }

 private:
  using L = Layout<C>;
  static Axis columns(const AttentionData<C>& d, const HeadTable& t) { return {d.p.window(), t.column}; }
  static HeadTable when(bool wanted, const HeadTable& t) { return wanted ? t : HeadTable{}; }
};

// The keys and values of one group of heads, and what key_rel adds to the scores of one of its heads outside the
// window.
template <class C>
struct Keys {
  const AttentionData<C>& d;
  HeadTables<C> tables;
  PackedRows<C> k, v;
  Scratch<C> edges;  // [2][padded]: left and right of the window
  int64_t batch = 0, group = 0, head = -1;

  Keys(const AttentionData<C>& data, bool gradients)
      : d(data),
        tables(data, gradients),
        k(d.p, d.p.k, gradients || d.p.key_rel.data != nullptr || few(d.p), d.p.qk && (gradients || !few(d.p)),
          d.score_scale(), gradients),
        v(d.p, d.p.v, !gradients || d.p.value_conv.data != nullptr, gradients, 1, gradients),
        edges(d.has_edges() ? 2 * d.padded : 0) {}

  void load(int64_t b, int64_t g) {
    batch = b;
    group = g;
    head = -1;
    k.load(b, g);
    v.load(b, g);
  }

  void choose_head(int64_t h) {
    if (h == head) return;
    head = h;
    tables.choose(h);
    if (!d.has_edges()) return;
    Scratch<C> outer(2 * d.width);
    clear(outer.get(), 2 * d.width);
    for (int64_t c = 0; c < d.p.channels; ++c) {
      outer[c] = tables.key_rel.at(c, d.p.window() - 1);
      outer[d.width + c] = tables.key_rel.at(c, 0);
    }
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t j = 0; j < d.padded; ++j)
        edges[side * d.padded + j] = dot(k.row(j), outer.get() + side * d.width, d.width);
  }

  static bool few(const Attention& p) { return p.queries <= kFewQueries; }
  const C* edge(int64_t side) const { return edges.get() + side * d.padded; }

  // u = value_conv_bias + sum over the taps of value_conv * v, before its scale.
  void convolve(const Place& place, C* u) const {
    if (d.p.value_conv_bias.data != nullptr)
      memcpy(static_cast<void*>(u), tables.value_conv_bias.get(), static_cast<size_t>(d.width) * sizeof(C));
    else
      clear(u, d.width);
    const Range taps = place.taps(d.p);
    for (int64_t c = taps.first; c < taps.end; ++c) {
      const int64_t j = place.at - d.p.left + c;
      if (d.is_real(batch, j)) d.multiply_add(u, tables.value_conv.get() + c * d.width, v.row(j));
    }
  }
};

}  // namespace ck::cpu::CK_ISA
